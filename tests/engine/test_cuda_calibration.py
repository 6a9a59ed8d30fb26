"""The GPU's measurement runs the engine's own calls; here on the emulated device, where it is only
a code path.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_experts
import torch

from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.engine import calibrate as calibrate_cpu
from hybrimoe_plugin.engine import calibrate_accelerator
from hybrimoe_plugin.engine.calibrate import FEW_ROWS_LOADS, REPEATS, calibrate
from hybrimoe_plugin.policy.profile import Side
from hybrimoe_plugin.policy.step import FEW_ROWS


def test_measurement_rotates_over_slots_and_gives_a_sound_profile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = make_accelerator("emulated", torch.device("cpu"))
    assert accelerator is not None
    seen: list[tuple[int, ...]] = []
    real = accelerator.compute

    def compute(slots: Sequence[int], *args: Any) -> torch.Tensor:
        seen.append(tuple(slots))
        return real(slots, *args)

    monkeypatch.setattr(accelerator, "compute", compute)
    side, link = calibrate_accelerator.measure_cuda(
        tiny_experts.layer(types=("Q8_0",) * 3), accelerator
    )
    assert side.tokens == tuple(sorted(calibrate_accelerator.LOADS))
    assert all(us > 0 for us in side.us)
    assert side.first_us >= 0
    assert link.gbps > 0
    assert {len(slots) for slots in seen} == {1, 4}
    assert {slot for slots in seen for slot in slots} == set(range(8)), (
        "every slot is used: none stays in a cache"
    )
    assert all(len(set(slots)) == len(slots) for slots in seen)


def test_a_union_is_checked_against_the_times_of_single_experts() -> None:
    side = Side(10.0, (1, 2), (100.0, 150.0))
    ids = np.array([[0, 1], [0, 2]])
    note = calibrate_accelerator.union_note("CPU", side, ids, 400.0)
    assert "3 experts took 400 us" in note
    assert note.endswith("360 us, 0.90 of it"), "10 + 150 + 2 * 100"


def test_every_load_of_a_few_rows_is_measured_and_a_union_noted() -> None:
    weights = tiny_experts.layer(types=("Q8_0",) * 3)
    accelerator = make_accelerator("emulated", torch.device("cpu"))
    profile = calibrate(
        weights, lambda _threads: TorchExperts(keep=True), accelerator, threads=1, progress=False
    )
    assert profile.cpu.tokens == tuple(sorted(calibrate_accelerator.LOADS))
    assert all(us > 0 for us in profile.cpu.us)
    few_rows = profile.cpu_few_rows
    assert few_rows is not None
    assert few_rows.tokens == tuple(sorted(FEW_ROWS_LOADS))
    assert all(us > 0 for us in few_rows.us)
    assert profile.notes[0].startswith("CPU: 16 rows with 8 experts took")
    _, _, notes = calibrate_accelerator.measure_accelerator(
        weights, Unlabelled(accelerator), statistics.median
    )
    assert notes[0].startswith("accelerator: 16 rows with 8 experts took")


class Additive(TorchExperts):
    """A CPU whose clock says what a call of several rows costs: 1 ms, and 1 ms for each choice."""

    def __init__(self, clock: list[int], calls: list[np.ndarray]) -> None:
        super().__init__(keep=True)
        self.clock, self.calls = clock, calls

    def submit(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        mine: Sequence[int],
    ) -> None:
        super().submit(layer, hidden, topk_ids, topk_weights, mine)
        rows = len(topk_ids)
        if topk_ids.shape[1] > 1 and 1 < rows <= FEW_ROWS:
            self.calls.append(topk_ids.numpy())
            self.clock[0] += 1_000_000 * (1 + topk_ids.numel())
        else:
            self.clock[0] += 77_000 * rows


def calibrated(monkeypatch: pytest.MonkeyPatch, **shape: int) -> tuple[Any, list[np.ndarray]]:
    clock, calls = [0], []
    stopped = SimpleNamespace(perf_counter_ns=lambda: clock[0], perf_counter=lambda: 0.0)
    monkeypatch.setattr(calibrate_cpu, "time", stopped)
    weights = tiny_experts.layer(types=("Q8_0",) * 3, **shape)
    found = calibrate(
        weights, lambda _threads: Additive(clock, calls), None, threads=1, progress=False
    )
    return found, calls


def test_calls_of_a_few_rows_have_costs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    profile, calls = calibrated(monkeypatch)
    side = profile.cpu_few_rows
    assert side.first_us == pytest.approx(1000.0)
    assert dict(zip(side.tokens, side.us, strict=True)) == pytest.approx(
        {load: 1000.0 * load for load in FEW_ROWS_LOADS}
    )
    assert profile.notes[0].endswith(", 1.00 of it"), "the check of a union"
    for ids in calls[: -1 - REPEATS]:  # all but the union's
        loads = np.bincount(ids.ravel())
        assert set(loads[loads > 0]) <= set(FEW_ROWS_LOADS)
        assert len(set(loads[loads > 0])) == 1
        assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_few_experts_have_no_costs_of_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    profile, _ = calibrated(monkeypatch, experts=5)
    assert profile.cpu_few_rows is None
    costs = profile.costs(profile.spec)
    assert costs.for_rows(few=True) is costs


class Unlabelled:
    """An accelerator that does not say that it is emulated."""

    name = "cuda"

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)
