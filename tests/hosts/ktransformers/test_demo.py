"""The real `ktransformers.local_chat` with the demo model says the same under our rules and under
its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import classic
import pytest

from hybrimoe_plugin.errors import WeightsError

pytestmark = classic.needs_host
QUESTION = "What is the capital of France?"


@pytest.fixture(autouse=True)
def _profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own, where this machine was measured already."""
    monkeypatch.setenv(
        "HYBRIMOE_PROFILES", str(Path(os.environ["XDG_CACHE_HOME"]) / "hybrimoe" / "profiles")
    )


@pytest.fixture(scope="module")
def folder() -> str:
    from hybrimoe_plugin.hosts.ktransformers.demo import classic_folder

    try:
        return str(classic_folder("mixtral"))
    except WeightsError as error:
        pytest.skip(str(error))


def test_without_a_cache_folder_the_spare_one_is_used(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe_plugin.cache_folder import spare_dir
    from hybrimoe_plugin.hosts.ktransformers.demo import classic_folder

    weights = next(Path(folder).glob("*.gguf")).resolve()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HYBRIMOE_CACHE", "/proc/none")
    (spare_dir() / "demo").mkdir()
    (spare_dir() / "demo" / weights.name).symlink_to(weights)
    made = classic_folder("mixtral")
    assert made.is_relative_to(tmp_path) and (made / "tokenizer.json").exists()
    assert classic_folder("mixtral") == made


def ask(folder: str, rules: str | None, capfd: pytest.CaptureFixture[str]) -> tuple[list[int], str]:
    """(token ids, what was printed) of one greedy answer by `local_chat` itself."""
    from hybrimoe_plugin.hosts.ktransformers.launch import Launch, run_local_chat

    answers: list[list[int]] = []
    flags = {
        "model_path": folder,
        "gguf_path": folder,
        "optimize_rule_path": rules,
        "use_cuda_graph": False,
        "max_new_tokens": 24,
        "cpu_infer": 1,
    }
    run_local_chat(Launch(flags, QUESTION, greedy=True), answered=answers.append)
    assert len(answers) == 1
    return answers[0], capfd.readouterr().out


def test_our_rules_and_its_own_give_the_same_greedy_tokens(
    folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, said = ask(folder, str(classic.RULES / "Mixtral-cpu.yaml"), capfd)
    assert (
        "Paris" in said and "eval rate:" in said
    )  # how it says so depends on the processor's kernels
    stock, said = ask(folder, None, capfd)
    assert "using default_optimize_rule for MixtralForCausalLM" in said
    assert ours == stock
    assert not [
        name
        for name in sys.modules
        if name.startswith(("ktransformers.", "cpuinfer_ext", "flash_attn"))
    ]


def test_the_command_answers_and_reports(folder: str) -> None:
    del folder
    command = [
        sys.executable,
        "-m",
        "hybrimoe_plugin",
        "ktransformers_chat",
        "--demo",
        "--greedy",
        "--prompt",
        QUESTION,
    ]
    environment = {
        **os.environ,
        "HYBRIMOE_CACHE": str(Path(os.environ["XDG_CACHE_HOME"]) / "hybrimoe"),
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "experts computed: " in done.stdout and "loading blk.0" not in done.stdout
