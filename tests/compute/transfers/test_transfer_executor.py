"""Transfers that another thread gives to the device: the plain twin's bytes, in order, and no error
lost.
"""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fake_streams import LazyStreams, Point, SharedStreams
from kernel_cases import random_call, random_layer, reference
from watched import WatchedKernels, watched_copy

from hybrimoe_plugin.compute.gpu import slot_writer
from hybrimoe_plugin.compute.gpu.host_bytes import StagedBytes
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.compute.gpu.transfer_executor import DoneWork, InlineExecutor, ThreadExecutor
from hybrimoe_plugin.device.streams import AHEAD, LINK, HostStreams
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.layer_weights import Bytes

EXPERTS, SLOTS, STEPS = 6, 4, 80
WEIGHTS = random_layer(("Q4_0", "F16", "Q8_0"), 64, 32, experts=EXPERTS)


class Gate(StagedBytes):
    """Staging that stops at a gate, and may fail behind it; notes which thread came."""

    def __init__(self, streams: Any, slow: bool = True) -> None:
        super().__init__(streams, ring=3, pinned=False, slow=slow)
        self.open = threading.Event()
        self.reached = threading.Event()
        self.threads: set[int] = set()
        self.error: Exception | None = None
        self.sources: list[int] = []

    def source(self, part: Bytes) -> torch.Tensor:
        self.reached.set()
        assert self.open.wait(20), "nobody opened the gate"
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        self.sources.append(part.ctypes.data)
        return super().source(part)


Make = Callable[..., tuple[SlotAccelerator, Gate, SharedStreams]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[tuple[SlotAccelerator, Gate]] = []

    def build(seed: int | None = None, slow: bool = True, shut: bool = False) -> Any:
        streams = SharedStreams(seed)
        monkeypatch.setattr(slot_writer, "_copy_async", watched_copy(streams))
        host = Gate(streams, slow)
        device = SlotAccelerator(
            torch.device("cpu"), "fake", WatchedKernels(streams), streams, host
        )
        device.allocate(SLOTS, [WEIGHTS])
        made.append((device, host))
        if not shut:
            host.open.set()
        return device, host, streams

    yield build
    for device, host in made:
        host.open.set()
        device.close()
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("hybrimoe-staging")
    ]


def compute(device: SlotAccelerator, held: dict[int, int], seed: int) -> torch.Tensor:
    hidden, ids, routing = random_call(3, EXPERTS, 64, 2, seed)
    table = torch.full((EXPERTS,), -1)
    for slot, expert in held.items():
        table[expert] = slot
    found = device.compute(tuple(held), hidden, table[ids], routing)
    wanted = reference(WEIGHTS, hidden, ids, routing, set(held.values()))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    return found


def traffic(device: SlotAccelerator, seed: int) -> list[torch.Tensor]:
    """Onloads, prefetches, cancellations and computes at random: what they compute, and the slots
    last of all.

    What is cancelled, and so computed, depends on how far the link has come: nothing cancelled is
    used here.
    """
    rng = random.Random(seed)
    held: dict[int, int] = {}
    found = []
    for step in range(STEPS):
        slot = rng.randrange(SLOTS)
        expert = rng.randrange(EXPERTS)
        held = {other: kept for other, kept in held.items() if kept != expert and other != slot}
        device.onload(slot, WEIGHTS, expert, ahead=rng.random() < 0.5)
        held[slot] = expert
        if rng.random() < 0.2:
            device.cancel(slot)
            del held[slot]
        if rng.random() < 0.5 and held:
            chosen = rng.sample(sorted(held), rng.randint(1, len(held)))
            found.append(compute(device, {slot: held[slot] for slot in chosen}, step))
    for slot in held:
        compute(device, {slot: held[slot]}, STEPS)
    device.synchronize()
    for slot in sorted(held):
        for part in device._transfers.held[
            slot
        ].layout.parts:  # what lies between them nobody writes
            found.append(device._buffer[slot, part.offset : part.offset + part.size].clone())
    return found


@pytest.mark.parametrize("seed", [None, 1, 2, 3, 4, 5])
def test_random_traffic_gives_the_plain_twins_bits(make: Make, seed: int | None) -> None:
    threaded, host, _ = make(seed)
    found = traffic(threaded, seed or 0)
    assert threading.get_ident() not in host.threads
    assert len(host.threads) == 1
    plain, host, _ = make(seed, slow=False)
    wanted = traffic(plain, seed or 0)
    assert host.threads == {threading.get_ident()}
    assert len(found) == len(wanted) > STEPS // 4
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_the_caller_goes_on_and_waits_where_the_bytes_are_needed(make: Make) -> None:
    device, host, streams = make(shut=True)
    device.onload(0, WEIGHTS, 5)
    device.onload(1, WEIGHTS, 2)
    assert host.reached.wait(20), "the thread has begun"
    assert not host.sources, "and this thread has come here before a byte was copied"
    streams.log.clear()
    threading.Timer(0.05, host.open.set).start()
    compute(device, {0: 5}, 0)
    begin = streams.log.index("stage 1")
    assert any(line.startswith("compute waits for") for line in streams.log[:begin])
    assert any(line.startswith("compute waits for") for line in streams.log[begin:])
    compute(device, {1: 2}, 1)
    wanted = [
        matrix.experts[expert].ctypes.data for expert in (5, 2) for matrix in WEIGHTS.matrices()
    ]
    assert host.sources == wanted


def test_prefetches_keep_to_their_depth_while_the_thread_is_behind(make: Make) -> None:
    device, host, _ = make(shut=True)
    for slot in range(SLOTS):
        device.onload(slot, WEIGHTS, slot, ahead=True)
    assert [device.cancel(slot) for slot in range(SLOTS)] == [False, False, True, True]
    host.open.set()
    compute(device, {0: 0, 1: 1}, 0)
    assert len(host.sources) == 6, "what was cancelled is never copied"


def test_synchronising_includes_what_the_thread_has_not_issued(make: Make) -> None:
    device, host, _ = make(shut=True)
    device.onload(3, WEIGHTS, 4)
    threading.Timer(0.05, host.open.set).start()
    device.synchronize()
    gate = device._transfers.held[3].layout.up
    stored = WEIGHTS.up.experts[4]
    np.testing.assert_array_equal(
        device._buffer[3, gate.offset : gate.offset + gate.size].numpy(), stored
    )


@pytest.mark.parametrize("superseded", [False, True])
def test_an_error_on_the_thread_reaches_the_next_wait_and_lasts_until_slots_are_made_anew(
    make: Make, superseded: bool
) -> None:
    device, host, _ = make()
    device.onload(1, WEIGHTS, 1)
    compute(device, {1: 1}, 0)
    host.error = OSError("the disk is gone")
    device.onload(0, WEIGHTS, 0)
    device._transfers.drain()
    host.error = None
    if superseded:
        device.onload(0, WEIGHTS, 3)
    for slot, expert in ((0, 3 if superseded else 0), (1, 1)):
        with pytest.raises(BackendError, match="the disk is gone"):
            compute(device, {slot: expert}, 1)
    with pytest.raises(BackendError, match="the disk is gone"):
        device.synchronize()
    device.allocate(SLOTS, [WEIGHTS])
    device.onload(0, WEIGHTS, 0)
    compute(device, {0: 0}, 2)


def test_an_interrupted_wait_comes_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    device, host, streams = make()
    device.onload(0, WEIGHTS, 1)
    device._transfers.drain()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streams, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compute(device, {0: 1}, 0)
    compute(device, {0: 1}, 1)


def test_settling_drops_what_failed_and_takes_jobs_again(make: Make) -> None:
    device, host, _ = make()
    device.onload(1, WEIGHTS, 1)
    device._transfers.drain()
    host.error = OSError("the disk is gone")
    device.onload(0, WEIGHTS, 0)
    device.onload(2, WEIGHTS, 2)
    device._transfers.drain()
    host.error = None
    assert device.settle() == {1: (WEIGHTS, 1)}
    device.onload(0, WEIGHTS, 3)
    compute(device, {0: 3, 1: 1}, 2)


def test_closing_finishes_what_was_sent_and_can_be_begun_anew(make: Make) -> None:
    device, host, _ = make(shut=True)
    for slot in range(SLOTS):
        device.onload(slot, WEIGHTS, slot)
    threading.Timer(0.05, host.open.set).start()
    device.close()
    assert len(host.sources) == 3 * SLOTS
    device.allocate(SLOTS, [WEIGHTS])
    device.onload(2, WEIGHTS, 5)
    compute(device, {2: 5}, 0)


def test_one_that_is_forgotten_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = HostStreams()
    host = StagedBytes(streams, pinned=False, slow=True)
    device = SlotAccelerator(
        torch.device("cpu"), "fake", WatchedKernels(LazyStreams()), streams, host
    )
    device.allocate(SLOTS, [WEIGHTS])
    device.onload(0, WEIGHTS, 1)
    device.synchronize()
    (worker,) = (
        thread for thread in threading.enumerate() if thread.name.startswith("hybrimoe-staging")
    )
    gone = weakref.ref(device)
    del device
    gc.collect()
    assert gone() is None
    worker.join(20)
    assert not worker.is_alive()


def test_closing_on_the_thread_itself_does_not_wait_for_itself() -> None:
    """A garbage collection there may find a forgotten model, whose engines it closes."""
    issuer = ThreadExecutor()

    def job() -> tuple[()]:
        issuer.drain()
        issuer.close()
        return ()

    assert issuer.submit(job).result() == ()


def test_the_interpreter_ends_with_transfers_under_way() -> None:
    program = """
import time
from hybrimoe_plugin.compute.gpu.transfer_executor import ThreadExecutor
issuer = ThreadExecutor()
for number in range(5):
    issuer.submit(lambda number=number: (time.sleep(0.02), print(number, flush=True)))
print("end", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split()[-4:] == ["1", "2", "3", "4"]
    assert not done.stderr


def test_at_once_is_the_same_without_a_thread() -> None:
    issuer = InlineExecutor()
    threads = []
    arrival = issuer.submit(lambda: (threads.append(threading.get_ident()), "event"))
    assert isinstance(arrival, DoneWork)
    assert arrival.done()
    assert arrival.result()[1] == "event"
    assert threads == [threading.get_ident()]
    with pytest.raises(ZeroDivisionError):
        issuer.submit(lambda: (1 / 0,))
    issuer.check()


@pytest.mark.parametrize("queue", [LINK, AHEAD])
def test_a_missing_edge_from_the_last_use_is_seen(
    make: Make, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test's own test: the thread's waits are what the fake streams check."""
    device, _, streams = make(1)
    wait = streams.wait

    def leaky(waiting: str, event: Point) -> None:
        if (waiting, event.queue) != (queue, "compute"):
            wait(waiting, event)

    monkeypatch.setattr(streams, "wait", leaky)
    with pytest.raises((AssertionError, BackendError), match="race"):
        traffic(device, 1)
    device._transfers.drain()
    for pending in streams._queues.values():
        pending.clear()
