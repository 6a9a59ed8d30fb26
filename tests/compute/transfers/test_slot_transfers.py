"""The slots' traffic on queues that run as late as they may: right data, no race, edges where they
belong.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_streams import LazyStreams, Point
from kernel_cases import random_call, random_layer, reference
from watched import WatchedKernels, watched_copy

from hybrimoe_plugin.compute.gpu import slot_writer
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.compute.gpu.host_bytes import HostBytes, PlainBytes, StagedBytes
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.compute.gpu.slot_transfers import AHEAD_DEPTH
from hybrimoe_plugin.device.streams import AHEAD, COMPUTE, LINK, REPACK
from hybrimoe_plugin.errors import BackendError, BudgetError
from hybrimoe_plugin.weights.layer_weights import LayerWeights

Build = Callable[..., tuple[SlotAccelerator, LazyStreams]]

EXPERTS, SLOTS = 6, 4
WEIGHTS = random_layer(("Q4_0", "F16", "Q8_0"), 64, 32, experts=EXPERTS)
AS_STORED = random_layer(("F16", "F16", "F32"), 64, 32, experts=EXPERTS)
IN_PLANES = random_layer(("Q4_0", "Q8_0", "Q5_0"), 64, 32, experts=EXPERTS)
EDGES = [
    *[(False, WEIGHTS, edge) for edge in [(COMPUTE, REPACK), (COMPUTE, LINK), (COMPUTE, AHEAD)]],
    *[(direct, WEIGHTS, (REPACK, queue)) for direct in (False, True) for queue in (LINK, AHEAD)],
    *[(True, AS_STORED, (COMPUTE, queue)) for queue in (LINK, AHEAD)],
    *[(True, kinds, (COMPUTE, REPACK)) for kinds in (WEIGHTS, IN_PLANES)],
]
"""(direct way or its twin, weights, an edge to new data that they need)"""
LAST_USES = [
    *[(False, WEIGHTS, queue) for queue in (LINK, AHEAD, REPACK)],
    *[(True, weights, queue) for weights in (WEIGHTS, AS_STORED) for queue in (LINK, AHEAD)],
    (True, IN_PLANES, REPACK),
]
"""(direct way or its twin, weights, a queue that writes slots)"""


@pytest.fixture(params=[True, False], ids=["direct", "plain"])
def direct(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, direct: bool) -> Build:
    """Makes a device on lazy streams; its copies tell them what they write."""

    def make(
        seed: int | None = None,
        host: HostBytes | None = None,
        streams: LazyStreams | None = None,
        ahead_depth: int = AHEAD_DEPTH,
        weights: LayerWeights = WEIGHTS,
        direct: bool = direct,
    ) -> tuple[SlotAccelerator, LazyStreams]:
        streams = streams or LazyStreams(seed)
        monkeypatch.setattr(slot_writer, "_copy_async", watched_copy(streams))
        kernels = WatchedKernels(streams)
        device = SlotAccelerator(
            torch.device("cpu"),
            "fake",
            kernels,
            streams,
            host or PlainBytes(),
            ahead_depth=ahead_depth,
            direct=direct,
        )
        device.allocate(SLOTS, [weights])
        return device, streams

    return make


def compute(
    device: SlotAccelerator, held: dict[int, int], seed: int, weights: LayerWeights = WEIGHTS
) -> None:
    """Compute slot -> expert and compare with the reference."""
    hidden, ids, routing = random_call(3, EXPERTS, 64, 2, seed)
    table = torch.full((EXPERTS,), -1)
    for slot, expert in held.items():
        table[expert] = slot
    found = device.compute(tuple(held), hidden, table[ids], routing)
    wanted = reference(weights, hidden, ids, routing, set(held.values()))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def traffic(
    device: SlotAccelerator, seed: int, steps: int, weights: LayerWeights = WEIGHTS
) -> None:
    """Random onloads, prefetches, cancellations and computes; slots are reused while work is
    queued.
    """
    rng = random.Random(seed)
    held: dict[int, int] = {}
    for step in range(steps):
        slot = rng.randrange(SLOTS)
        expert = rng.randrange(EXPERTS)
        held = {other: kept for other, kept in held.items() if kept != expert and other != slot}
        device.onload(slot, weights, expert, ahead=rng.random() < 0.5)
        held[slot] = expert
        if rng.random() < 0.2 and device.cancel(slot):
            del held[slot]
        if rng.random() < 0.5 and held:
            chosen = rng.sample(sorted(held), rng.randint(1, len(held)))
            compute(device, {slot: held[slot] for slot in chosen}, step, weights)


@pytest.mark.parametrize("weights", [WEIGHTS, AS_STORED, IN_PLANES], ids=["mixed", "as", "planes"])
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_random_traffic_is_right_and_without_races(
    build: Build, seed: int | None, weights: LayerWeights
) -> None:
    device, _ = build(seed, weights=weights)
    traffic(device, seed or 0, 120, weights)
    device.close()


def test_staging_buffers_are_reused_only_when_read(build: Build) -> None:
    streams = LazyStreams(4)
    device, _ = build(streams=streams, host=StagedBytes(streams, ring=3, pinned=False))
    traffic(device, 4, 80)
    assert streams.host_waits > 0, "three buffers cannot hold what waits here"
    device.close()


@pytest.mark.parametrize(("direct", "weights", "edge"), EDGES)
def test_a_missing_edge_to_new_data_is_seen(
    build: Build, weights: LayerWeights, edge: tuple[str, str]
) -> None:
    """The test's own test: without any one of the edges the traffic above fails."""

    class Leaky(LazyStreams):
        def wait(self, queue: str, event: Any) -> None:
            if (queue, event.queue) != edge:
                super().wait(queue, event)

    device, _ = build(streams=Leaky(), weights=weights)
    with pytest.raises((AssertionError, IndexError)):
        traffic(device, 0, 120, weights)


@pytest.mark.parametrize(("direct", "weights", "queue"), LAST_USES)
def test_a_missing_edge_from_the_last_use_is_seen(
    build: Build, weights: LayerWeights, queue: str
) -> None:
    class Leaky(LazyStreams):
        def wait(self, waiting: str, event: Any) -> None:
            if (waiting, event.queue) != (queue, COMPUTE):
                super().wait(waiting, event)

    device, _ = build(streams=Leaky(1), weights=weights)
    with pytest.raises(AssertionError, match="race"):
        traffic(device, 1, 200, weights)


@pytest.mark.parametrize("queue", [LINK, AHEAD])
def test_a_repack_buffer_that_is_written_too_early_is_seen(build: Build, queue: str) -> None:
    class Leaky(LazyStreams):
        def wait(self, waiting: str, event: Any) -> None:
            if (waiting, event.queue) != (queue, REPACK):
                super().wait(waiting, event)

    device, _ = build(streams=Leaky(), weights=IN_PLANES)
    with pytest.raises(AssertionError):
        traffic(device, 1, 200, IN_PLANES)


@pytest.mark.parametrize(
    ("direct", "weights", "queue"), [(False, WEIGHTS, REPACK), (True, AS_STORED, LINK)]
)
def test_compute_starts_before_down_has_arrived(
    build: Build, weights: LayerWeights, queue: str
) -> None:
    device, streams = build(weights=weights)
    device.onload(0, weights, 5)
    streams.log.clear()
    compute(device, {0: 5}, 0, weights)
    assert streams.log.index("stage 1") < streams.log.index(
        f"compute waits for {queue}", streams.log.index("stage 1")
    )
    assert streams.log[-1] == "stage 2"
    assert streams.host_waits == 0


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_prefetches_wait_for_room_and_can_be_dropped(build: Build, depth: int) -> None:
    device, _ = build(ahead_depth=depth)
    device.allocate(depth + 3, [WEIGHTS])
    for slot in range(depth + 3):
        device.onload(slot, WEIGHTS, slot % EXPERTS, ahead=True)
    first, second, third = range(depth, depth + 3)
    assert not device.cancel(0), "the link has it already"
    assert device.cancel(first)
    assert not device.cancel(first)
    device.onload(second, WEIGHTS, 1)  # supersedes a waiting prefetch
    assert device.cancelled == 2
    compute(device, {second: 1}, 1)
    compute(device, {third: third % EXPERTS}, 2)  # needed while it waits: sent at once
    with pytest.raises(BackendError, match="never onloaded"):
        compute(device, {first: first % EXPERTS}, 3)


def test_a_demand_load_has_few_prefetches_before_it(build: Build) -> None:
    """The link serves copies in the order in which the device was given them."""
    device, streams = build()
    device.allocate(8, [WEIGHTS])
    for slot in range(7):
        device.onload(slot, WEIGHTS, slot % EXPERTS, ahead=True)
    events = sum(isinstance(item, Point) for item in streams._queues[AHEAD])
    device.onload(7, WEIGHTS, 0)
    assert device._transfers._waiting.keys() == set(range(2, 7))
    assert events
    assert events == sum(isinstance(item, Point) for item in streams._queues[AHEAD])
    with pytest.raises(ValueError, match="ahead_depth"):
        build(ahead_depth=0)
    assert make_accelerator("emulated", torch.device("cpu"), ahead_depth=4)._ahead_depth == 4


def test_after_an_interrupted_compute_slots_keep_what_has_arrived(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, _ = build()
    device.onload(0, WEIGHTS, 1)
    with monkeypatch.context() as patch:
        patch.setattr(WatchedKernels, "down", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            compute(device, {0: 1}, 0)
    assert device.settle() == {0: (WEIGHTS, 1)}
    device.onload(0, WEIGHTS, 2)
    compute(device, {0: 2}, 1)


def test_memory_that_is_not_there_is_a_budget_error(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, _ = build()

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    real = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "empty", lambda *args, **kw: refuse() if args[0] == 9 else real(*args, **kw)
        )
        with pytest.raises(BudgetError, match="9 slots"):
            device.allocate(9, [WEIGHTS])
    device.allocate(2, [WEIGHTS])
    device.onload(1, WEIGHTS, 0)
    compute(device, {1: 0}, 0)


def test_compute_makes_its_device_the_current_one_where_another_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels are launched on the current device, which is another where a model has several."""

    class Several(LazyStreams):
        away = True

        def elsewhere(self) -> bool:
            return self.away

    streams = Several()
    entered = []

    @contextmanager
    def inside(device: torch.device) -> Iterator[None]:
        entered.append(device)
        streams.away = False
        yield
        streams.away = True

    class Placed(WatchedKernels):
        def gate_up(self, call: Any) -> Any:
            assert not streams.away
            return super().gate_up(call)

        def down(self, call: Any, activations: Any) -> torch.Tensor:
            assert not streams.away
            return super().down(call, activations)

    monkeypatch.setattr(torch.cuda, "device", inside)
    device = SlotAccelerator(torch.device("cpu"), "fake", Placed(streams), streams)
    device.allocate(SLOTS, [AS_STORED])
    device.onload(2, AS_STORED, 4)
    compute(device, {2: 4}, 0, AS_STORED)
    assert entered == [torch.device("cpu")]
    assert streams.away
