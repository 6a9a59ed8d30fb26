"""Single stages of the GPU check that need no card."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval.gpu_check.place import Place
from eval.gpu_check.stages import slots
from eval.gpu_check.stages.speed import devices, int8, path
from eval.gpu_check.stages.where import _union_us
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.device.streams import HostStreams
from hybrimoe_plugin.injection.rules import load_rules


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


def test_the_chain_is_compared_with_its_twin() -> None:
    found = path.systems()
    names = {item.name for item in dataclasses.fields(Settings)}
    assert len(found) == 2
    for system in found:
        assert set(system.settings) <= names


def test_driver_calls_are_told_apart_by_their_whole_names() -> None:
    names = ["cudaEventQuery", "cudaEventSynchronize", "cudaStreamSynchronize", "cudaLaunchKernel"]
    seen = SimpleNamespace(events=lambda: [SimpleNamespace(name=name) for name in names])
    assert path._count(seen, path.BLOCKING) == 2
    assert path._count(seen, path.ASKING) == 1


def test_two_cards_share_the_tiny_model(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(devices.two_card_rules(), encoding="utf-8")
    rules = load_rules(file).rules
    experts = [rule for rule in rules if "HybriMoEExperts" in rule.replace_class]
    cards = [
        next(
            rule.kwargs["generate_device"]
            for rule in experts
            if re.search(str(rule.match_name), f"model.layers.{number}.mlp.experts")
        )
        for number in (0, 1)
    ]
    assert cards == ["cuda:0", "cuda:1"]
    assert not any("cache_bytes" in rule.kwargs for rule in experts)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two cards")
def test_one_card_says_why_two_were_not_tried(tmp_path: Path) -> None:
    (row,) = devices.run(Place(tmp_path, tmp_path, dry=True))
    assert row["ok"] is None
    assert "a second GPU" in row["missing"]


def test_int8_kernels_that_differ_are_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hybrimoe_plugin.compute.gpu.kernels.int8 import proof

    place = Place(tmp_path, tmp_path, dry=True)

    def differ(*_: object) -> None:
        raise proof.Disagreement("down of Q8_0: not the bits of plain arithmetic")

    monkeypatch.setattr(proof, "check", differ)
    (row,) = int8.run(place)
    assert row["ok"] is False
    assert "not the bits" in row["detail"]
