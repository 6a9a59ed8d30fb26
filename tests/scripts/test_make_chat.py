"""`make chat PROMPT=...` hands a prompt over as it was typed: make and the shell take nothing in it
for their own.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
SAYS_ITS_ARGUMENTS = '#!/bin/sh\nprintf "<%s>" "$@"\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for folder in (".venv", ".venv-ktransformers"):
        command = tmp_path / folder / "bin" / "hybrimoe"
        command.parent.mkdir(parents=True)
        command.write_text(SAYS_ITS_ARGUMENTS)
        command.chmod(0o755)
    return tmp_path


def make(project: Path, target: str, *variables: str, **environment: str) -> str:
    command = ["make", "-s", "-f", str(MAKEFILE), "PYTHON=true", target, *variables]
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
        **environment,
    }
    return subprocess.run(
        command, cwd=project, env=env, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    "prompt",
    [
        "What is 2+2?",
        'it costs $5, `touch made` "quoted" $HOME $$ \\ ; it\'s a=b #c & (d)',
        "$(shell touch made) ${HOME} $@",
        "--help",
        "two\nlines ü",
        "ends with \\",
    ],
)
def test_a_prompt_arrives_as_typed(
    prompt: str,
    project: Path,
) -> None:
    said = make(project, "chat", f"PROMPT={prompt}")
    assert said == f"<local_chat><--demo><--prompt={prompt}>"
    said = make(project, "chat-ktransformers", f"PROMPT={prompt}")
    assert said.endswith(f"<--demo><--greedy><--prompt={prompt}>")
    assert make(project, "chat", PROMPT=prompt) == f"<local_chat><--demo><--prompt={prompt}>"
    assert not (project / "made").exists()


def test_without_a_prompt_it_talks(project: Path) -> None:
    assert make(project, "chat") == "<local_chat><--demo>"
