"""A device whose every queue is late, graphs too: nothing has run until somebody has to wait.

What the host launches is only noted. It runs, in the order of its queue and behind the events it
waits for, when the host waits, now and then while the host looks at its own memory, and before any
operation of torch that is not part of a graph (which would be queued behind it on a device). Copies
from pinned memory that the host need not wait for are late as well: what it writes there too early
is what the device reads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_streams import LazyStreams, Point
from replayed import Replayed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.decode.chain import stamp
from hybrimoe_plugin.device.streams import COMPUTE, PendingCopy
from hybrimoe_plugin.engine import assemble


class LateStreams(LazyStreams):
    """`LazyStreams` whose compute queue is late too."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._late = random.Random(seed + 1)
        self.host_memory: set[int] = set()
        """Storages of pinned memory: to read them is no work of the device."""
        self._kept: list[torch.Tensor] = []
        """All pinned memory: none of it is to be given to something else."""
        self.running = False

    def record(self, queue: str) -> Point:
        point = Point(queue, dict(self._clocks[queue]))
        self._queues[queue].append(point)
        return point

    def wait(self, queue: str, event: Point) -> None:
        self._merge(self._clocks[queue], event.clock)
        self._queues[queue].append(lambda: self._force(event))

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(tensor)
        self.host_memory.add(made.untyped_storage()._cdata)
        self._kept.append(made)
        return made

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> PendingCopy:
        self.run_compute()
        return super().copy_to_host(tensors)

    def look(self) -> None:
        """The host looks at its memory: meanwhile some work is done."""
        for _ in range(self._late.randrange(3)):
            queue = self._late.choice(list(self._queues))
            if self._queues[queue]:
                self._advance(queue)

    def run_compute(self) -> None:
        """Everything that compute has been given."""
        while self._queues[COMPUTE]:
            self._advance(COMPUTE)

    def _advance(self, queue: str) -> None:
        if not self._queues[queue]:
            return
        running, self.running = self.running, True
        try:
            super()._advance(queue)
        finally:
            self.running = running

    def _force(self, event: Point) -> None:
        while not event.done:
            assert self._queues[event.queue], "an event that nothing comes to"
            self._advance(event.queue)


class LateCapture(Replayed):
    """Graphs whose replays are queued."""

    def __init__(self, streams: LateStreams) -> None:
        super().__init__()
        self._streams = streams
        self.launched = 0

    def end(self) -> Callable[[], None]:
        replay = super().end()

        def launch() -> None:
            self.launched += 1
            self._streams.enqueue(COMPUTE, replay)

        return launch

    def abandon(self) -> None:
        self._streams.run_compute()
        super().abandon()


class InOrder(TorchDispatchMode):
    """Runs what is queued on compute before any other operation on the device's memory; queues
    copies from pinned memory.
    """

    def __init__(self, streams: LateStreams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._streams.running and not _is_view(func):
            used = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
            memories = {tensor.untyped_storage()._cdata for tensor in used}
            if _is_late_copy(func, args, kwargs) and self._pinned(args[1]) > self._pinned(args[0]):
                self._streams.enqueue(COMPUTE, lambda: func(*args, **(kwargs or {})))
                return args[0]
            if not memories <= self._streams.host_memory:
                self._streams.run_compute()
        return func(*args, **(kwargs or {}))

    def _pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._streams.host_memory


def _is_late_copy(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation copies into a tensor and lets the host go on."""
    if func is not torch.ops.aten.copy_.default:
        return False
    return bool(args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False))


def _is_view(func: Any) -> bool:
    """Whether an operation only gives another view of memory: no device does anything then."""
    aliases = [given.alias_info for given in func._schema.returns]
    return bool(aliases) and all(alias and not alias.is_write for alias in aliases)


@contextmanager
def late_device(patch: pytest.MonkeyPatch, seed: int) -> Iterator[LateCapture]:
    """While entered, models that are loaded use a late device."""
    streams = LateStreams(seed)

    def make(*_: Any, **__: Any) -> SlotAccelerator:
        return SlotAccelerator(torch.device("cpu"), "emulated", TorchKernels(), streams)

    patch.setattr(assemble, "make_accelerator", make)
    patch.setattr(stamp.time, "sleep", lambda _seconds: streams.look())
    with InOrder(streams):
        yield LateCapture(streams)
