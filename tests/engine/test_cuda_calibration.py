"""The GPU's measurement runs the engine's own calls; here on the emulated device, where it is only
a code path.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny_experts
import torch

from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.engine import calibrate_accelerator
from hybrimoe_plugin.engine.calibrate import calibrate
from hybrimoe_plugin.policy.profile import Side


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
    assert note.endswith("360 us"), "10 + 150 + 2 * 100"


def test_every_load_of_a_few_rows_is_measured_and_a_union_noted() -> None:
    weights = tiny_experts.layer(types=("Q8_0",) * 3)
    accelerator = make_accelerator("emulated", torch.device("cpu"))
    profile = calibrate(
        weights, lambda _threads: TorchExperts(keep=True), accelerator, threads=1, progress=False
    )
    assert profile.cpu.tokens == tuple(sorted(calibrate_accelerator.LOADS))
    assert all(us > 0 for us in profile.cpu.us)
    assert profile.notes[0].startswith("CPU: 16 rows with 8 experts took")
    _, _, notes = calibrate_accelerator.measure_accelerator(
        weights, Unlabelled(accelerator), statistics.median
    )
    assert notes[0].startswith("accelerator: 16 rows with 8 experts took")


class Unlabelled:
    """An accelerator that does not say that it is emulated."""

    name = "cuda"

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)
