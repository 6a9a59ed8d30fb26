"""The check's stage for flashinfer, with a module in its place that computes plainly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fake_flashinfer
import pytest
import torch
from replayed import Replayed

from eval.gpu_check.place import Place, Row
from eval.gpu_check.stages import flashinfer as stage
from hybrimoe_plugin.compute.attention import flashinfer_pages, kernel_choice
from hybrimoe_plugin.hosts.transformers import sampling

SECOND = 1e6


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, tmp_path, dry=True)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = fake_flashinfer.make()
    monkeypatch.setattr(flashinfer_pages, "WORKSPACE_BYTES", 1 << 10)
    monkeypatch.setattr(flashinfer_pages, "installed", lambda: True)
    monkeypatch.setitem(sys.modules, "flashinfer", made)
    monkeypatch.setattr(stage, "capture_for", lambda device: Alternating())
    walls = [2 * SECOND, SECOND] * 100  # transformers, flashinfer

    def wall_us(
        work: Callable[[], object],
        device: torch.device,
    ) -> float:
        work()
        return walls.pop(0)

    monkeypatch.setattr(sampling, "median_wall_us", wall_us)
    return made


class Alternating(Replayed):
    """torch's replays take two seconds, flashinfer's one."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def time_us(self, replay: Callable[[], None]) -> float:
        replay()
        self.asked += 1
        return 2 * SECOND if self.asked % 2 else SECOND


def of_kind(rows: Sequence[Row], words: str) -> list[Row]:
    """The rows whose case has these words; there must be some."""
    found = [row for row in rows if words in row["case"]]
    assert found, words
    return found


def test_what_is_not_installed_is_named(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flashinfer_pages, "installed", lambda: False)
    (row,) = stage.run(place)
    assert row["ok"] is None
    assert "pip install" in row["missing"]


def test_without_a_card_it_says_so(
    place: Place,
    library: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "capture_for", lambda device: None)
    (row,) = stage.run(place)
    assert row["ok"] is None
    assert "CUDA device" in row["missing"]


def test_every_shape_and_filter_is_measured(
    place: Place,
    library: Any,
) -> None:
    version, *rows = stage.run(place)
    assert "ok" not in version, "a fact, not a judgement"
    cases = {row["case"] for row in rows}
    assert len(rows) == len(cases)
    assert len(rows) == len(stage.CASES) * 2 + len(stage.FILTERS)
    for row in rows:
        assert row["ok"] is True
        assert row["chosen"] is True
        assert row["flashinfer_us"] == SECOND
    for row in of_kind(rows, "attention"):
        assert 0 < row["relative_rms"] < 0.01, "bfloat16 against float32"
        assert row["torch_us"] == 2 * SECOND
    for row in of_kind(rows, "sampling"):
        assert row["transformers_us"] == 2 * SECOND


def test_attention_that_is_wrong_is_a_fault(
    place: Place,
    library: Any,
) -> None:
    library.decode.wrong = 0.5
    for row in of_kind(list(stage.run(place)), "Qwen3"):
        assert row["ok"] is False
        assert row["relative_rms"] > max(kernel_choice.TOLERANCES.values())


def test_a_graph_that_does_not_follow_its_plan_is_a_fault(
    place: Place,
    library: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Frozen(Alternating):
        """Replays nothing: what was captured stays as it was."""

        def end(self) -> Callable[[], None]:
            super().end()
            return lambda: None

    monkeypatch.setattr(stage, "capture_for", lambda device: Frozen())
    monkeypatch.setattr(library.latent, "run", _drifting(library.latent.run))
    for row in of_kind(list(stage.run(place)), "DeepSeek"):
        assert row["ok"] is False
        assert "differs" in row["detail"]


def _drifting(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Right in the first three calls, which are made outside of graphs."""
    calls: list[int] = []

    def drifting(self: Any, **given: Any) -> torch.Tensor:
        calls.append(1)
        return run(self, **given) + 0.5 * ((len(calls) - 1) % 5 > 2)

    return drifting


def test_what_fails_is_missing(
    place: Place,
    library: Any,
) -> None:
    library.latent.once = True  # it cannot be planned again
    library.sampling.wrong = True
    rows = list(stage.run(place))
    for row in of_kind(rows, "DeepSeek"):
        assert row["ok"] is None
        assert "cannot replan" in row["missing"]
    for row in of_kind(rows, "sampling"):
        assert row["ok"] is False
        assert row["chosen"] is False
