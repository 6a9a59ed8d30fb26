"""Every command of the README is run by CI or by a test, and every file that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hybrimoe_plugin.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

RUN_BY = {
    "make chat PROMPT": ".ci/run",
    "make test": ".ci/run",
    "make chat-ktransformers PROMPT": ".ci/run",
    "pip install .": "scripts/setup_env.py",
    "hybrimoe doctor": "tests/cli/test_doctor.py",
    "hybrimoe local_chat --model_path": "tests/cli/test_local_chat.py",
    "hybrimoe local_chat --flash_pack": "tests/cli/test_flash.py",
    "hybrimoe flash-pack": "tests/cli/test_flash.py",
    "hybrimoe lever-train": "tests/cli/test_flash.py",
    ".venv-ktransformers/bin/hybrimoe patches": "tests/cli/test_ktransformers.py",
    ".venv-ktransformers/bin/hybrimoe ktransformers_chat": "tests/hosts/ktransformers/test_demo.py",
    "python -m eval.schedule": "eval/all.py",
    "python -m eval.cache": "eval/all.py",
    "python -m eval.prefetch": "eval/all.py",
    "python -m eval.replay": "eval/all.py",
    "python -m eval.throughput --model demo": "tests/eval/test_throughput.py",
    "python -m eval.gpu_check": ".ci/run",
    "python -m eval.throughput --device cuda": "tests/eval/test_cuda.py",
    "python -m eval.cuda_model": "tests/eval/test_cuda_model.py",
    "python -m eval.fidelity": "eval/all.py",
    "python -m eval.lever": "eval/all.py",
    "python -m eval.flips": "eval/all.py",
    "make eval": ".ci/run",
}
"""Command, as far as it matters -> what runs it. `make peers` compiles llama.cpp and is run by hand
only.
"""
BY_HAND = ("make peers",)


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line[2:].split("   #")[0].strip() for line in lines]


@pytest.mark.parametrize("command", commands())
def test_every_command_is_run_somewhere(command: str) -> None:
    if command.startswith(BY_HAND):
        return
    runner = next((place for start, place in RUN_BY.items() if command.startswith(start)), None)
    assert runner is not None, f"nothing runs {command!r}"
    assert (ROOT / runner).exists()
    words = command.split()
    if words[0].endswith("hybrimoe"):
        assert words[1] in {command.name for command in COMMANDS}
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing
