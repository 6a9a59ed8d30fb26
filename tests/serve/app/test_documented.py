"""The commands and programs of serving.md, as they stand there, against a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrimoe_plugin.demo import source_path
from hybrimoe_plugin.errors import HybriMoEError

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (curl .*)$", PAGE, re.MULTILINE)
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server with the demo model."""
    try:
        source_path()
    except HybriMoEError as missing:
        pytest.skip(str(missing))
    command = [sys.executable, "-m", "hybrimoe_plugin", "serve", "--demo", "--port", "0"]
    command += ["--served_model_name", "demo", "--shutdown_seconds", "1"]
    environment = {**os.environ}
    environment.pop("HYBRIMOE_API_KEY", None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()
        assert process.wait(60) == 0


def run(command: list[str]) -> str:
    environment = {**os.environ, "HYBRIMOE_API_KEY": KEY}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_documented_command_is_answered(command: str, address: str) -> None:
    there = command.replace("http://localhost:8000", address)
    assert there != command
    out = run(["bash", "-c", there.replace("curl ", "curl -sSf ", 1)])
    if "chat" in command and "stream" not in command:
        assert json.loads(out)["choices"][0]["message"]["content"]
    assert out


@pytest.mark.parametrize("program", PROGRAMS, ids=("openai", "anthropic"))
def test_a_documented_program_prints_the_answer(program: str, address: str) -> None:
    there = program.replace("http://localhost:8000", address)
    assert "Paris" in run([sys.executable, "-c", there])
