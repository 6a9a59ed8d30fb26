"""The check's stage for our own decode attention, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from replayed import Replayed

from eval.gpu_check.place import Place
from eval.gpu_check.stages import attention as stage
from hybrimoe_plugin.compute.attention.decode_attention import GQAShape
from hybrimoe_plugin.device.cuda_graphs import Capture

pytest.importorskip("triton")
from hybrimoe_plugin.compute.attention.split_attention import SplitAttention


class Timed(Replayed):
    """Every replay takes 10 us."""

    def time_us(self, replay: Callable[[], None]) -> float:
        replay()
        return 10.0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, tmp_path, dry=True)


def test_without_a_card_it_is_judged_and_not_timed(place: Place) -> None:
    rows = list(stage.run(place))
    assert len(rows) == len(stage.CASES) * len(stage.DRY_ROOMS)
    for row in rows:
        assert row["ok"] is True
        assert 0 < row["relative_rms"] < 0.01, "bfloat16 against float32"
        assert "kernel_us" not in row


@pytest.mark.parametrize("capture", [None, Timed()])
def test_what_is_wrong_is_a_fault(capture: Capture | None, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = GQAShape(4, 2, 16, 64, torch.bfloat16, 0.25)
    device, position = torch.device("cpu"), torch.zeros(1, dtype=torch.int64)
    row = stage.measured(SplitAttention(shape, device, position), device, capture, position)
    assert row["ok"] is True
    if capture is not None:
        assert row["gbps"] == pytest.approx(33 * 2 * 2 * 16 * 2 / 10e3)
    elsewhere = torch.full((1,), 5)
    row = stage.measured(SplitAttention(shape, device, elsewhere), device, capture, position)
    assert row["ok"] is False
