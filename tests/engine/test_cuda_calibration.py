"""The GPU's measurement runs the engine's own calls; here on the emulated device, where it is only
a code path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny_experts
import torch

from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.engine import calibrate_accelerator


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
    assert side.tokens == calibrate_accelerator.LOADS
    assert all(us > 0 for us in side.us)
    assert side.first_us >= 0
    assert link.gbps > 0
    assert {len(slots) for slots in seen} == {1, 4}
    assert {slot for slots in seen for slot in slots} == set(range(8)), (
        "every slot is used: none stays in a cache"
    )
    assert all(len(set(slots)) == len(slots) for slots in seen)
