"""`hybrimoe calibrate` shows what was measured and where it is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrimoe_plugin.cli import calibrate, models
from hybrimoe_plugin.cli.main import main
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.device import machine
from hybrimoe_plugin.policy.profile import Link, MachineProfile, Side
from hybrimoe_plugin.replay.profile_files import load_profile

PROFILE = MachineProfile(
    name="this machine",
    label="emulated",
    created="2026-11-24",
    spec=ExpertSpec(64, 32, 8, 2, "Q8_0", "Q8_0", "Q6_K", 1000, 1000, 1000),
    cpu=Side(5.0, (1, 16), (100.0, 250.0), 2),
    accelerator=Side(20.0, (1, 16), (12.0, 17.0)),
    link=Link(3.0, 15.0),
    notes=("accelerator and link are assumed",),
)


def test_numbers_and_path_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    kept = tmp_path / "kept.json"
    kept.touch()

    def measure(*arguments: Any) -> tuple[str, MachineProfile, Path]:
        asked.append(arguments)
        return "kt", PROFILE, kept

    monkeypatch.setattr(calibrate, "_measure", measure)
    out = tmp_path / "profile.json"
    assert main(["calibrate", "--gguf_path", "g", "--cpu_threads", "2", "--out", str(out)]) == 0
    assert (asked[0][:2], asked[0][2].cpu_threads) == ((None, "g"), 2)
    lines = capsys.readouterr().out.splitlines()
    assert "64 x 32 in Q8_0/Q6_K" in lines[0]
    assert [line.split() for line in lines[1:5]] == [
        ["us", "per", "expert", "CPU", "by", "kt,", "2", "thread(s)", "accelerator"],
        ["1", "token", "100", "12"],
        ["16", "tokens", "250", "17"],
        ["first", "expert", "+5", "+20"],
    ]
    assert lines[-3:] == [
        "link: 3.0 GB/s, latency 15 us, 16 us per expert",
        "accelerator and link are assumed",
        str(kept),
    ]
    assert load_profile(out) == PROFILE


def test_times_in_calls_of_a_few_rows_have_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    few_rows = Side(9.0, (1, 16), (80.0, 200.0), 2)
    cpu = Side(5.0, (1, 64), (100.0, 250.0), 2)
    calibrate._show(replace(PROFILE, cpu=cpu, cpu_few_rows=few_rows), "kt")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "token", "100", "80", "12"] in lines
    assert ["64", "tokens", "250", "33"] in lines, "no such load"
    assert ["first", "expert", "+5", "+9", "+20"] in lines


def test_without_a_model_the_demo_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(models, "demo_gguf", lambda form: Path(f"{form}.gguf"))
    monkeypatch.setattr(
        calibrate,
        "_measure",
        lambda *arguments: (asked.append(arguments), ("ggml", PROFILE, Path("p")))[1],
    )
    assert main(["calibrate"]) == 0
    assert asked[0][1] == "mixtral.gguf"
    # A model's directory may hold its weights too; the demo's are not those.
    assert main(["calibrate", "--model_path", "m"]) == 0
    assert asked[1][:2] == ("m", "m")


def test_a_device_that_is_not_there_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "cuda_refusal", lambda: "torch sees no CUDA device")
    monkeypatch.setattr(models, "demo_gguf", lambda _form: pytest.fail("builds the demo model"))
    assert main(["calibrate", "--accelerator", "cuda"]) == 2
    assert "torch sees no CUDA device; use --accelerator none" in capsys.readouterr().err


def test_wrong_file_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"no GGUF")
    assert main(["calibrate", "--gguf_path", str(path)]) == 2
    assert "a.gguf" in capsys.readouterr().err
