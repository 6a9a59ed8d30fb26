"""Which stages the GPU check runs, on which card, and how long they may take."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.gpu_check import check, plan
from eval.gpu_check.plan import STAGES


def test_times_add_up_to_what_is_promised() -> None:
    usual = [stage for stage in STAGES if not stage.on_demand and not stage.background]
    judges = {stage.name for stage in usual if stage.judges}
    assert judges == {"kernels", "slots", "graphs"}
    total_s = sum(stage.limit_s for stage in usual)
    core_s = sum(stage.limit_s for stage in usual if stage.core)
    assert total_s <= plan.TOTAL_S
    assert core_s <= plan.CORE_S
    names = [stage.name for stage in STAGES]
    assert names.index("prepare") < names.index("model")
    assert [stage.core for stage in usual] == sorted(
        (stage.core for stage in usual), reverse=True
    ), "core comes first"


def test_the_model_s_file_is_written_before_whoever_reads_it() -> None:
    found = check.wanted(STAGES, STAGES, ["where"], set())
    assert [stage.name for stage in found] == ["prepare", "where"]
    left = check.wanted(STAGES, STAGES[:4], None, {"prepare", "facts"})
    assert [stage.name for stage in left] == ["kernels", "slots"]


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="there is a card")
def test_a_card_is_what_the_driver_lists(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.card_name() is None
    for text, name in (
        ("echo 'NVIDIA H100'; echo 'NVIDIA H200'", "NVIDIA H100"),
        ("echo no devices; exit 9", None),
    ):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
        assert check.card_name() == name
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([path / "nvidia0"]))
    assert check.card_name() == check.UNKNOWN, "a card whose driver does not answer is still one"
