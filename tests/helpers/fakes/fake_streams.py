"""Queues that run as late as their edges allow, and see every race: for tests of the slots' traffic
without a GPU.
"""

from __future__ import annotations

import ctypes
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eval.host_path.edges import Access, Clock
from hybrimoe_plugin.device.streams import COMPUTE, QUEUES, PendingCopy


@dataclass
class Point:
    """An event."""

    queue: str
    clock: Clock
    done: bool = False


class LazyStreams:
    """Work runs only when something waits for it; compute runs at once, as a host that is far ahead
    sees it.

    Late work makes a missing edge to compute show as old data. `reads` and `writes` are checked
    against all earlier ones that overlap: two that no chain of edges orders are a race, whatever
    the data says.

    Args:
        seed: how far `reached` lets queues advance; None: not at all.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._queues: dict[str, deque[Callable[[], None] | Point]] = {
            name: deque() for name in QUEUES
        }
        self._clocks: dict[str, Clock] = {name: {} for name in QUEUES}
        self._host: Clock = {}
        self._random = random.Random(seed) if seed is not None else None
        self._accesses: list[Access] = []
        self._running: tuple[str, Clock] = (COMPUTE, {})
        self.host_waits = 0
        self.log: list[str] = []

    def enqueue(self, queue: str, work: Callable[[], None]) -> None:
        self._tick(queue)
        clock = dict(self._clocks[queue])

        def item() -> None:
            self._running = queue, clock
            work()

        self._queues[queue].append(item)

    @property
    def takes_addresses(self) -> bool:
        return True

    def elsewhere(self) -> bool:
        return False

    def copy(self, queue: str, target: int, source: int, nbytes: int) -> None:
        assert queue != COMPUTE

        def work() -> None:
            self._access(target, target + nbytes, write=True)
            ctypes.memmove(target, source, nbytes)

        self.enqueue(queue, work)

    def launch(self, queue: str, work: Callable[[int], None]) -> None:
        assert queue != COMPUTE
        self.enqueue(queue, lambda: work(0))

    def record(self, queue: str) -> Point:
        point = Point(queue, dict(self._clocks[queue]), done=queue == COMPUTE)
        if queue != COMPUTE:
            self._queues[queue].append(point)
        return point

    def wait(self, queue: str, event: Point) -> None:
        self.log.append(f"{queue} waits for {event.queue}")
        self._merge(self._clocks[queue], event.clock)
        if queue == COMPUTE:
            self._force(event)
        else:
            self._queues[queue].append(lambda: self._force(event))

    def reached(self, event: Point) -> bool:
        while self._random is not None and not event.done and self._random.random() < 0.5:
            self._advance(event.queue)
        if event.done:
            self._merge(self._host, event.clock)
        return event.done

    def block(self, event: Point) -> None:
        self.host_waits += 1
        self._force(event)
        self._merge(self._host, event.clock)

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> PendingCopy:
        return PendingCopy(self, list(tensors), [self.record(COMPUTE)])

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor)

    def pending_copy(self, tensors: list[torch.Tensor]) -> PendingCopy:
        return PendingCopy(self, tensors, [self.record(COMPUTE)])

    def copy_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def synchronize(self) -> None:
        for name, queue in self._queues.items():
            while queue:
                self._advance(name)
            self._merge(self._host, self._clocks[name])

    def touch(self, tensor: torch.Tensor, write: bool, compute: bool = False) -> None:
        """The running work (or compute) reads or writes this memory."""
        if compute:
            self._tick(COMPUTE)
            self._running = COMPUTE, dict(self._clocks[COMPUTE])
        start = tensor.data_ptr()
        self._access(start, start + tensor.numel() * tensor.element_size(), write)

    def _access(self, start: int, end: int, write: bool) -> None:
        queue, clock = self._running
        now = Access(queue, clock, write, start, end)
        kept = []
        for old in self._accesses:
            if old.meets(now):
                assert old.before(now) or now.before(old), f"race: {old} and {now}"
            # What this access covers need not be kept: whatever comes after it comes after the old
            # one too.
            covered = now.start <= old.start and old.end <= now.end and old.before(now)
            if not (covered and (write or (not old.write and old.stream == queue))):
                kept.append(old)
        self._accesses = [*kept, now]

    def _tick(self, queue: str) -> None:
        clock = self._clocks[queue]
        self._merge(clock, self._host)
        clock[queue] = clock.get(queue, 0) + 1

    def _force(self, event: Point) -> None:
        while not event.done:
            self._advance(event.queue)

    def _advance(self, queue: str) -> None:
        item = self._queues[queue].popleft()
        if isinstance(item, Point):
            item.done = True
            return
        trace = sys.gettrace()
        sys.settrace(None)  # what a device does cannot be interrupted from outside
        try:
            item()
        finally:
            sys.settrace(trace)

    @staticmethod
    def _merge(clock: Clock, other: Clock) -> None:
        for name, count in other.items():
            clock[name] = max(clock.get(name, 0), count)


class SharedStreams(LazyStreams):
    """Two threads may call it, as they may call CUDA."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(seed)
        self._lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("_") or not callable(value):
            return value
        lock = self._lock

        def locked(*args: Any, **more: Any) -> Any:
            with lock:
                return value(*args, **more)

        return locked
