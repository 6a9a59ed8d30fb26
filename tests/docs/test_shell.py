"""The commands of a document work in a shell that has done nothing else.

Each page's commands go through one bare shell, in their order. Those that only change the shell are
run; of the others the shell is asked which program it would take: what belongs to an environment
must come from one that the page has activated, or be called by its path.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import venv
from itertools import groupby
from pathlib import Path

import pytest

from tests.docs.test_commands import Command, commands

CHANGES_THE_SHELL = (".", "source", "cd", "export")
OUR_OWN = ("python", "pip", "hybrimoe")
ENVIRONMENTS = (".venv", ".venv-pip", ".venv-ktransformers")

PAGES = {page: list(group) for page, group in groupby(commands(), lambda command: command.page)}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose environments hold nothing but the names of programs."""
    root = tmp_path_factory.mktemp("clone")
    for name in ENVIRONMENTS:
        venv.create(root / name, symlinks=True)
        for program in OUR_OWN:
            path = root / name / "bin" / program
            if not path.exists():
                path.write_text("#!/bin/sh\n")
                path.chmod(0o755)
    bundle = root / "build" / "gpu-bundle"
    bundle.mkdir(parents=True)
    # Of a GPU machine, whose own Python has the libraries.
    (bundle / "activate").write_text(f"PATH={root}/.venv/bin:$PATH\n")
    return root


def taken(page: str, clone: Path) -> dict[str, str]:
    """Command -> the program that the shell would run for it."""
    lines = ["set -e"]
    asked = []
    for command in PAGES[page]:
        for part in command.text.split(" && "):
            words = shlex.split(part, comments=True)
            if words[0] in CHANGES_THE_SHELL:
                lines.append(part)
            else:
                lines.append(f"type -P {shlex.quote(words[0])} || echo nothing")
                asked.append(part)
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-c", "\n".join(lines)],
        cwd=clone,
        env={"PATH": os.defpath, "HOME": str(clone)},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(asked, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_finds_its_programs(page: str, clone: Path) -> None:
    for text, program in taken(page, clone).items():
        name = shlex.split(text, comments=True)[0]
        if Path(name).name in OUR_OWN:
            found = clone / program
            assert found.is_relative_to(clone), f"{page}: {text}: takes {program}"
            assert found.exists(), f"{page}: {text}: there is no {program}"


def test_a_forgotten_activation_is_found(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAGES, "page", [Command("page", "hybrimoe doctor")])
    assert taken("page", clone) == {"hybrimoe doctor": "nothing"}
