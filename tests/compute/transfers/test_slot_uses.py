"""Uses noted by layer order a slot's next content as uses noted by slot do; arrivals are told
without stopping the host.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_streams import LazyStreams, SharedStreams
from interrupts import ended, operations
from kernel_cases import random_call, random_layer, reference
from watched import WatchedKernels, watched_copy

from hybrimoe_plugin.compute.gpu import slot_writer
from hybrimoe_plugin.compute.gpu.host_bytes import HostBytes, StagedBytes
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.compute.gpu.slot_uses import KEPT, SlotUses
from hybrimoe_plugin.device.streams import AHEAD, LINK, REPACK
from hybrimoe_plugin.errors import BackendError

EXPERTS, SLOTS = 6, 4
LAYERS = [
    random_layer(("Q4_0", "F16", "Q8_0"), 64, 32, experts=EXPERTS, index=index)
    for index in range(2)
]
Make = Callable[..., SlotAccelerator]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a device on these streams, with slots for both layers."""

    def build(
        streams: LazyStreams, host: HostBytes | None = None, direct: bool = True
    ) -> SlotAccelerator:
        monkeypatch.setattr(slot_writer, "_copy_async", watched_copy(streams))
        device = SlotAccelerator(
            torch.device("cpu"), "fake", WatchedKernels(streams), streams, host, direct=direct
        )
        device.allocate(SLOTS, LAYERS)
        return device

    return build


Held = dict[int, tuple[int, int]]
"""Slot -> (layer, expert)."""


def compute(device: SlotAccelerator, layer: int, held: Held, seed: int) -> None:
    """Compute all of a layer's experts that are held, and compare with the reference."""
    hidden, ids, routing = random_call(3, EXPERTS, 64, 2, seed)
    table = torch.full((EXPERTS,), -1)
    slots = {}
    for slot, (owner, expert) in held.items():
        if owner == layer:
            table[expert] = slot
            slots[slot] = expert
    if not slots:
        return
    found = device.compute(tuple(slots), hidden, table[ids], routing)
    wanted = reference(LAYERS[layer], hidden, ids, routing, set(slots.values()))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def traffic(
    device: SlotAccelerator, seed: int, note: Callable[[int], None], steps: int = 150
) -> None:
    """Random onloads, prefetches, cancellations and layer calls; `note` hears of each call."""
    rng = random.Random(seed)
    held: Held = {}
    for step in range(steps):
        slot, wanted = rng.randrange(SLOTS), (rng.randrange(2), rng.randrange(EXPERTS))
        held = {other: kept for other, kept in held.items() if kept != wanted and other != slot}
        device.onload(slot, LAYERS[wanted[0]], wanted[1], ahead=rng.random() < 0.5)
        held[slot] = wanted
        if rng.random() < 0.2 and device.cancel(slot):
            del held[slot]
        if rng.random() < 0.5:
            layer = rng.randrange(2)
            compute(device, layer, held, step)
            note(layer)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_uses_by_layer_are_enough(
    make: Make, seed: int | None, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make(LazyStreams(seed), direct=direct)
    monkeypatch.setattr(device._transfers, "used", lambda slots: None)
    traffic(device, seed or 0, lambda layer: device.used_layer(LAYERS[layer]))
    device.close()


@pytest.mark.parametrize("noted", [None, 0, 1])
def test_a_use_that_nobody_notes_is_a_race(
    make: Make, noted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test's own test: the other layer's event does not do."""
    device = make(LazyStreams(1))
    monkeypatch.setattr(device._transfers, "used", lambda slots: None)

    def note(layer: int) -> None:
        if layer == noted:
            device.used_layer(LAYERS[layer])

    with pytest.raises(AssertionError, match="race"):
        traffic(device, 1, note)


@pytest.mark.parametrize("queue", [LINK, AHEAD, REPACK])
def test_every_queue_that_writes_waits_for_the_layer(
    make: Make, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leaky(LazyStreams):
        def wait(self, waiting: str, event: Any) -> None:
            if (waiting, event.queue) != (queue, "compute"):
                super().wait(waiting, event)

    device = make(Leaky(1), direct=False)
    monkeypatch.setattr(device._transfers, "used", lambda slots: None)
    with pytest.raises(AssertionError, match="race"):
        traffic(device, 1, lambda layer: device.used_layer(LAYERS[layer]))


def test_the_later_use_of_the_slot_and_of_its_owner_counts() -> None:
    uses = SlotUses(1)
    first, second = LAYERS
    assert uses.refill(0, first) is None
    uses.layer(first, "layer 1")
    uses.slots([0], "slot 2")
    assert uses.refill(0, first) == "slot 2"
    assert uses.refill(0, first) is None, "the layer's use came before this content"
    uses.slots([0], "slot 3")
    uses.layer(first, "layer 4")
    uses.layer(second, "layer 5")
    assert uses.refill(0, second) == "layer 4", "its owner's, not that of its next one"
    assert uses.refill(0, first) is None
    uses.layer(first, "layer 6")
    uses.forget()
    assert uses.refill(0, first) is None
    uses.layer(first, "layer 7")
    assert uses.refill(0, first) == "layer 7", "owners outlast what was forgotten"


def test_the_oldest_event_that_is_kept_stands_for_all_before_it() -> None:
    uses = SlotUses(2)
    for number in range(1, KEPT + 3):
        uses.slots([0 if number == 1 else 1], f"use {number}")
    assert uses.refill(0, LAYERS[0]) == "use 3"
    assert uses.refill(1, LAYERS[0]) == f"use {KEPT + 2}"


def test_a_cancelled_prefetch_leaves_the_slot_to_its_owners_event(make: Make) -> None:
    streams = LazyStreams()
    device = make(streams)
    held = {0: (0, 1)}
    device.onload(0, LAYERS[0], 1)
    compute(device, 0, held, 0)
    device.used_layer(LAYERS[0])
    device.onload(1, LAYERS[1], 1, ahead=True)
    device.onload(2, LAYERS[1], 2, ahead=True)
    device.onload(0, LAYERS[1], 0, ahead=True)  # two are under way: it waits
    assert device.cancel(0)
    device._transfers._uses._of_slot[0] = 0  # only the layer's event is left
    streams.log.clear()
    device.onload(0, LAYERS[1], 3)
    assert streams.log.count("link waits for compute") == 1
    compute(device, 1, {0: (1, 3)}, 1)


def test_arrivals_are_told_without_stopping_the_host(make: Make) -> None:
    class Asked(LazyStreams):
        asked = 0

        def reached(self, event: Any) -> bool:
            self.asked += 1
            return super().reached(event)

    streams = Asked()
    device = make(streams)
    assert not device.arrived(0), "nothing was sent"
    device.onload(0, LAYERS[0], 1)
    assert not device.arrived(0), "late queues have done nothing yet"
    while streams._queues[LINK]:
        streams._advance(LINK)
    assert not device.arrived(0), "gate and down are not rearranged"
    while streams._queues[REPACK]:
        streams._advance(REPACK)
    assert device.arrived(0)
    asked = streams.asked
    assert device.arrived(0)
    assert streams.asked == asked, "once known, nothing is asked"
    streams.log.clear()
    compute(device, 0, {0: (0, 1)}, 0)
    assert not streams.log.count("compute waits for link"), "the host has seen it arrive"
    device.onload(0, LAYERS[1], 2)
    assert not device.arrived(0), "the slot's next content is on its way"
    assert streams.host_waits == 0


def test_compute_waits_for_all_of_a_slot_once(make: Make) -> None:
    streams = LazyStreams()
    device = make(streams)
    device.onload(0, LAYERS[0], 1)
    device.wait_for([0])
    waits = [entry for entry in streams.log if entry.startswith("compute waits")]
    assert waits
    assert device.arrived(0), "whatever is launched now comes behind it"
    streams.log.clear()
    device.wait_for([0])
    compute(device, 0, {0: (0, 1)}, 0)
    assert not any(entry.startswith("compute waits") for entry in streams.log)
    device.onload(0, LAYERS[1], 2)
    assert not device.arrived(0), "the slot's next content is on its way"
    device.wait_for([0])
    compute(device, 1, {0: (0, 2)}, 1)
    assert streams.host_waits == 0


def test_what_waits_or_was_dropped_has_not_arrived(make: Make) -> None:
    streams = LazyStreams()
    device = make(streams)
    for slot in range(3):
        device.onload(slot, LAYERS[0], slot, ahead=True)
    streams.synchronize()
    assert [device.arrived(slot) for slot in range(3)] == [True, True, False]
    assert device.cancel(2)
    assert not device.arrived(2)
    device.onload(2, LAYERS[0], 5, ahead=True)
    device.pump()
    streams.synchronize()
    assert device.arrived(2)


@pytest.mark.parametrize("direct", [True, False])
def test_whatever_is_interrupted_the_next_calls_are_right_and_without_races(
    make: Make, direct: bool
) -> None:
    """At a share of all places; then the slots hold what `settle` says, byte for byte."""

    def some(device: SlotAccelerator) -> None:
        for slot in range(SLOTS):
            device.onload(slot, LAYERS[slot % 2], slot, ahead=slot > 1)
        device.used_layer(LAYERS[0])
        for slot in range(SLOTS):
            device.arrived(slot)
        device.cancel(3)
        device.pump()
        device.onload(0, LAYERS[1], 5)
        compute(device, 1, {0: (1, 5)}, 0)
        device.used_layer(LAYERS[1])
        device.onload(0, LAYERS[0], 1)
        device.arrived(0)

    first = make(LazyStreams(2), direct=direct)
    count = operations(lambda: some(first))
    for place in range(1, count, count // 50):
        device = make(LazyStreams(2), direct=direct)
        ended(lambda device=device: some(device), place, KeyboardInterrupt())  # type: ignore[misc]
        kept = device.settle()
        assert not device.wrong_slots(kept), place
        for slot in kept:
            assert device.arrived(slot)
        traffic(device, place, lambda layer, device=device: device.used_layer(LAYERS[layer]), 25)
        device.close()


@pytest.mark.parametrize("settled", [False, True])
def test_a_transfer_that_failed_never_arrives(make: Make, settled: bool) -> None:
    streams = SharedStreams()
    host = StagedBytes(streams, pinned=False, slow=True)
    device = make(streams, host)

    def fail(*_: object) -> torch.Tensor:
        raise OSError("the disk is gone")

    host.source = fail  # type: ignore[method-assign]
    device.onload(0, LAYERS[0], 0)
    device._transfers.drain()
    if settled:
        device.settle()
        assert not device.arrived(0)
    else:
        with pytest.raises(BackendError, match="the disk is gone"):
            device.arrived(0)
    device._transfers.close()
