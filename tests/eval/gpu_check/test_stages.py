"""Single stages of the GPU check that need no card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.gpu_check.place import Place
from eval.gpu_check.stages import slots
from eval.gpu_check.stages.where import _union_us
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.device.streams import HostStreams


def test_slots_go_on_alike_whether_or_not_a_prefetch_could_be_cancelled(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a card prefetches are under way until the device is waited for, so cancelling is a matter
    of luck.
    """

    class Lagging(HostStreams):
        waited = False

        def reached(self, event: Any) -> bool:
            return self.waited

        def synchronize(self) -> None:
            self.waited = True

    def make_lagging(
        name: str,
        device: torch.device,
    ) -> SlotAccelerator:
        return SlotAccelerator(device, name, TorchKernels(), Lagging())

    monkeypatch.setattr(slots, "make_accelerator", make_lagging)
    rows = list(slots.run(Place(tmp_path, tmp_path, dry=True)))
    assert all(row["ok"] and row["calls"] > 10 for row in rows)


def test_overlapping_work_on_the_device_counts_once() -> None:
    assert _union_us([(0, 10), (5, 12), (20, 21), (20.5, 20.7)]) == 13
    assert _union_us([]) == 0
