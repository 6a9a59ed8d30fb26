"""Every command that a document shows is one that works: run by a test or by CI, or at least read
by the program's own argument parser.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

from hybrimoe_plugin.cli.main import COMMANDS, main
from hybrimoe_plugin.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])

RUN_BY = {
    "hybrimoe cache": "tests/test_kept_files.py",
    "hybrimoe calibrate": "tests/cli/test_calibrate.py",
    "hybrimoe demo_model": "Makefile",
    "hybrimoe doctor": "tests/cli/test_doctor.py",
    "hybrimoe explain": "tests/cli/test_explain.py",
    "hybrimoe flash_pack": "tests/cli/test_flash.py",
    "hybrimoe install_ktransformers": "tests/hosts/classic_host/test_environment.py",
    "hybrimoe ktransformers_chat": "tests/hosts/ktransformers/test_demo.py",
    "hybrimoe lever_train": "tests/cli/test_flash.py",
    "hybrimoe local_chat": "tests/cli/test_local_chat.py",
    "hybrimoe patches": "tests/cli/test_ktransformers.py",
    "hybrimoe serve": "tests/cli/test_serve.py",
    "hybrimoe translate_rules": "tests/hosts/classic_host/test_translated_rules.py",
    "python -m eval.batches": "eval/reporting/answers.py",
    "python -m eval.cache": "eval/reporting/answers.py",
    "python -m eval.cuda_model": "tests/eval/cuda/test_cuda_model.py",
    "python -m eval.fidelity": "eval/reporting/answers.py",
    "python -m eval.flips": "eval/reporting/answers.py",
    "python -m eval.gpu_check": "Makefile",
    "python -m eval.host_path": "eval/reporting/answers.py",
    "python -m eval.kernel_prebuild": "scripts/gpu_bundle.py",
    "python -m eval.kernels": "tests/eval/test_kernels_eval.py",
    "python -m eval.kernels_cpu": "tests/eval/cpu/test_kernels_cpu.py",
    "python -m eval.ktransformers": "eval/ktransformers.py",
    "python -m eval.lever": "eval/reporting/answers.py",
    "python -m eval.loading": "tests/eval/test_loading.py",
    "python -m eval.prefetch": "eval/reporting/answers.py",
    "python -m eval.replay": "eval/reporting/answers.py",
    "python -m eval.rows": "eval/reporting/answers.py",
    "python -m eval.schedule": "eval/reporting/answers.py",
    "python -m eval.serving": "eval/reporting/answers.py",
    "python -m eval.throughput": "tests/eval/test_throughput.py",
    "python -m tests.fuzz": "Makefile",
    "python scripts/gpu_bundle.py": "tests/scripts/test_gpu_bundle.py",
    "python scripts/layer_figure.py": "tests/docs/test_pages.py",
    "python scripts/lock.py": "tests/scripts/test_locks.py",
    "python scripts/settings_doc.py": "tests/docs/test_pages.py",
}
"""Program -> what runs it. `eval.ktransformers` measures for long in an environment of its own and
is run by hand; `eval.all` runs the questions of `answers.py`.
"""

BY_HAND = {
    "figures": "draws what the tests of each question draw",
    "fuzz": "takes hours; a minute of each kind is among the tests",
    "gpu-bundle": "takes a quarter of an hour and the network",
    "peers": "compiles llama.cpp",
    "peers-server": "compiles llama.cpp's server",
    "test-pythons": "may download gigabytes of CUDA",
}
"""Make targets that CI does not call."""

BY_SERVER = {"curl": ("tests/serve/app/test_documented.py", ".ci/run")}
"""Programs that talk to a server, and what runs all such lines of a page."""

SHELL = (".", "cd", "export", "git", "kill", "pre-commit", "source")
"""Not this project's."""


class Command(NamedTuple):
    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Without comment, redirection, environment and the environment's folder."""
        words = [word for word in shlex.split(self.text, comments=True) if word != "&"]
        if ">" in words:
            words = words[: words.index(">")]
        words[0] = re.sub(r"^\.venv[\w-]*/bin/", "", words[0])
        return words

    @property
    def program(self) -> str:
        words = self.words
        if words[0] == "python" and words[1] == "-m":
            return " ".join(words[:3])
        return " ".join(words[:2])


class Parsed(BaseException):
    """The arguments were read; nothing beyond that is to happen."""


def commands() -> list[Command]:
    """The lines of console blocks that begin with a prompt."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```(?:console|bash)\n(.*?)```", text, re.DOTALL)
        for line in "".join(blocks).splitlines():
            if line.startswith("$ "):
                command = Command(page.name, line[2:])
                found.append(command)
    return found


def mentions() -> list[Command]:
    """Commands in the running text, as far as they have flags."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        spans = re.findall(r"`((?:hybrimoe|make|python) [^`]+)`", prose)
        for span in spans:
            one_line = " ".join(span.split())
            found.append(Command(page.name, one_line))
    return found


def targets(called: str) -> set[str]:
    """Make targets that this text calls, and what they need."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = dict(re.findall(r"^([\w-]+):(?!=)([^#\n]*)", makefile, re.MULTILINE))
    found: set[str] = set()
    waiting = re.findall(r"\bmake ([\w-]+)", called)
    while waiting:
        target = waiting.pop()
        assert target in rules, f"the Makefile has no target {target}"
        if target not in found:
            found.add(target)
            waiting += rules[target].split()
    return found


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.text[:60])
def test_a_command_is_run_somewhere(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command.words
    if words[0] in SHELL:
        return
    if words[:3] == ["python3", "-m", "venv"]:
        return  # and its activation behind it; test_shell.py types both
    if words[0] == "pip":
        check_pins(command)
    elif words[0] in BY_SERVER:
        runners = BY_SERVER[words[0]]
        assert any(command.page in (ROOT / name).read_text(encoding="utf-8") for name in runners)
    elif words[0] == "make":
        # CI types the README's commands.
        called = [(ROOT / name).read_text(encoding="utf-8") for name in (".ci/run", "README.md")]
        by_ci = targets("\n".join(called))
        assert words[1] in by_ci or words[1] in BY_HAND
        targets(f"make {words[1]}")
    else:
        runner = next(RUN_BY[name] for name in RUN_BY if dashed(name) == dashed(command.program))
        name = re.split(r"[ /.]", command.program.removesuffix(".py"))[-1]
        text = (ROOT / runner).read_text(encoding="utf-8")
        assert name in text or dashed(name) in text
        check_arguments(command, monkeypatch)


@pytest.mark.parametrize("command", mentions(), ids=lambda command: command.text[:60])
def test_a_command_in_the_text_is_one(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command.words
    if words[0] == "make":
        targets(f"make {words[1]}")
    elif any(word.startswith("-") for word in words[2:]) and words[1] != "-m":
        check_arguments(command, monkeypatch)
    elif words[0] == "hybrimoe":
        names = {dashed(name.name) for name in COMMANDS}
        assert dashed(words[1]) in names or words[1] in ("--help", "help")
    elif words[1] != "-m":
        assert (ROOT / words[1]).exists()


def dashed(name: str) -> str:
    """The same for both spellings of a command's name."""
    return name.replace("_", "-")


def check_arguments(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program read its arguments, and stop it there."""
    read = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
        read(self, *args, **options)
        raise Parsed

    words = command.words
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    with pytest.raises(Parsed):
        if words[0] == "hybrimoe":
            code = main(words[1:])
            pytest.fail(f"{command.page}: {command.text}: ended with {code}")
        elif words[1] == "-m":
            monkeypatch.setattr(sys, "argv", words[2:])
            runpy.run_module(words[2], run_name="__main__", alter_sys=False)
        else:
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")


def check_pins(command: Command) -> None:
    """An exact version is the one that set-up installs."""
    pinned = {extra.requirement for extra in EXTRAS}
    assert {word for word in command.words if "==" in word} <= pinned
