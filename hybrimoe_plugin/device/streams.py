"""Queues of one device and the events between them: every cross-stream edge is one `wait`.

There are four queues:

    LINK     demand loads: weights that the running layer needs now
    AHEAD    prefetches, so that neither kind of copy waits for the other's slots to be free
    REPACK   kernels that rearrange arrived bytes, so that a copy never waits for a kernel
    COMPUTE  whatever stream the model runs on
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from hybrimoe_plugin.device.raw_copies import HOST_TO_DEVICE, loaded_copy
from hybrimoe_plugin.errors import BackendError

LINK, AHEAD, REPACK, COMPUTE = "link", "ahead", "repack", "compute"
QUEUES = (LINK, AHEAD, REPACK, COMPUTE)

Event = Any
"""A point in a queue: made by `record` and only ever handed back."""


class PendingCopy:
    """Tensors that are being copied to the CPU.

    Args:
        tensors: on the CPU; valid once all events have been reached.
    """

    def __init__(
        self, streams: Streams, tensors: list[torch.Tensor], events: Sequence[Event] = ()
    ) -> None:
        self._streams = streams
        self._tensors = tensors
        self._events = events

    def poll(self) -> list[torch.Tensor] | None:
        """The tensors if they have arrived, else None; the host does not wait."""
        if all(self._streams.reached(event) for event in self._events):
            return self._tensors
        return None

    def wait(self) -> list[torch.Tensor]:
        """The tensors; stops the host until they have arrived."""
        for event in self._events:
            self._streams.block(event)
        return self._tensors


class Streams(Protocol):
    """In-order queues: work of one queue runs in order, and only events order the queues."""

    @property
    def takes_addresses(self) -> bool:
        """Whether `copy` can be called."""
        ...

    def elsewhere(self) -> bool:
        """Whether another device than this one is current; kernels are launched on that one."""
        ...

    def enqueue(self, queue: str, work: Callable[[], None]) -> None:
        """Append work to a queue; it may only start device operations."""
        ...

    def copy(self, queue: str, target: int, source: int, nbytes: int) -> None:
        """Append a copy between addresses to a queue that is not `COMPUTE`.

        Nothing checks the addresses: the caller knows that both ranges are whole and stay so.

        Args:
            target: on this device.
            source: in host memory that the device reads at full speed.

        Raises:
            BackendError: the device refuses.
        """
        ...

    def launch(self, queue: str, work: Callable[[int], None]) -> None:
        """Append kernels to a queue that is not `COMPUTE`; where `copy` can be called.

        Args:
            work: launches them on the stream whose handle it is given; 0 where there is none.
        """
        ...

    def record(self, queue: str) -> Event:
        """The point after everything queued so far."""
        ...

    def wait(self, queue: str, event: Event) -> None:
        """Run what is queued from now on after the event; the host does not wait."""
        ...

    def reached(self, event: Event) -> bool:
        """Whether the event lies in the past; the host does not wait."""
        ...

    def block(self, event: Event) -> None:
        """Make the host wait for the event."""
        ...

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> PendingCopy:
        """Queue copies to the CPU behind what `COMPUTE` has so far; the host does not wait."""
        ...

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """CPU memory that this tensor can be copied to without stopping the host."""
        ...

    def pending_copy(self, tensors: list[torch.Tensor]) -> PendingCopy:
        """The CPU tensors that work queued on `COMPUTE` so far copies into."""
        ...

    def copy_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on this device, for `COMPUTE`; the host does not wait."""
        ...

    def synchronize(self) -> None:
        """Make the host wait for everything."""
        ...


class HostStreams:
    """The emulated device: all work runs at once, on the CPU."""

    takes_addresses = True

    def elsewhere(self) -> bool:
        return False

    def enqueue(self, queue: str, work: Callable[[], None]) -> None:
        work()

    def copy(self, queue: str, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def launch(self, queue: str, work: Callable[[int], None]) -> None:
        work(0)

    def record(self, queue: str) -> Event:
        return None

    def wait(self, queue: str, event: Event) -> None:
        """Nothing to do: everything queued before has run."""

    def reached(self, event: Event) -> bool:
        return True

    def block(self, event: Event) -> None:
        """Nothing to do: everything queued before has run."""

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> PendingCopy:
        return PendingCopy(self, [tensor.to("cpu") for tensor in tensors])

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu")

    def pending_copy(self, tensors: list[torch.Tensor]) -> PendingCopy:
        return PendingCopy(self, tensors)

    def copy_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def synchronize(self) -> None:
        """Nothing to do: everything queued before has run."""


class _Recorded:
    """One recording of a CUDA event, which can be recorded anew when this is forgotten.

    Whatever was told to wait for it waits for the recording, not for the event.
    """

    __slots__ = ("_spare", "event")

    def __init__(self, event: torch.cuda.Event, spare: list[torch.cuda.Event]) -> None:
        self.event = event
        self._spare = spare

    def __del__(self) -> None:
        self._spare.append(self.event)


class CudaStreams:
    """One CUDA stream for each queue; `COMPUTE` is torch's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Lower numbers go first, but among kernels only: copies cross the link in the order in
        # which they were queued (`AHEAD_DEPTH`).
        self._streams = {
            LINK: torch.cuda.Stream(device, priority=-2),
            AHEAD: torch.cuda.Stream(device, priority=0),
            REPACK: torch.cuda.Stream(device, priority=-2),
        }
        self._copy = loaded_copy()
        self._handles: dict[str, int] = {}
        if self.takes_addresses:
            self._handles = {name: stream.cuda_stream for name, stream in self._streams.items()}
        self._several = device.index is not None and torch.cuda.device_count() > 1
        self._spare: list[torch.cuda.Event] = []
        """Events of this device that nobody refers to any more."""

    @property
    def takes_addresses(self) -> bool:
        return self._copy is not None

    def elsewhere(self) -> bool:
        return self._several and torch.cuda.current_device() != self._device.index

    def enqueue(self, queue: str, work: Callable[[], None]) -> None:
        if queue == COMPUTE:
            work()
            return
        with torch.cuda.stream(self._streams[queue]):
            work()

    def copy(self, queue: str, target: int, source: int, nbytes: int) -> None:
        assert self._copy is not None, "takes_addresses comes first"
        if self._several and self.elsewhere():
            # A copy follows its stream; but the runtime would take memory on the current device.
            with torch.cuda.device(self._device):
                self.copy(queue, target, source, nbytes)
            return
        status = self._copy(target, source, nbytes, HOST_TO_DEVICE, self._handles[queue])
        if status:
            raise BackendError(f"copy of {nbytes} bytes to {self._device}: CUDA error {status}")

    def launch(self, queue: str, work: Callable[[int], None]) -> None:
        if not self.elsewhere():
            work(self._handles[queue])
            return
        with torch.cuda.device(self._device):
            work(self._handles[queue])

    def record(self, queue: str) -> Event:
        try:
            event = self._spare.pop()  # not asked before: another thread may take the last one
        except IndexError:
            event = torch.cuda.Event()
        event.record(self._streams.get(queue) or self._current())
        return _Recorded(event, self._spare)

    def wait(self, queue: str, event: Event) -> None:
        (self._streams.get(queue) or self._current()).wait_event(event.event)

    def reached(self, event: Event) -> bool:
        return bool(event.event.query())

    def block(self, event: Event) -> None:
        event.event.synchronize()

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> PendingCopy:
        """As the protocol says; a tensor may lie on any CUDA device or on the CPU."""
        copies = []
        devices = set()
        for tensor in tensors:
            if tensor.device.type != "cpu":
                # On the tensor's own device, after what made it.
                devices.add(tensor.device)
                tensor = self.pinned_like(tensor).copy_(tensor, non_blocking=True)
            copies.append(tensor)
        events = []
        for device in devices:
            event = torch.cuda.Event()  # of that device, so it is not for the spare ones
            event.record(torch.cuda.current_stream(device))
            events.append(_Recorded(event, []))
        return PendingCopy(self, copies, events)

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def pending_copy(self, tensors: list[torch.Tensor]) -> PendingCopy:
        return PendingCopy(self, tensors, [self.record(COMPUTE)])

    def copy_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        # The caching host allocator reuses the pinned copy's memory only after the transfer.
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def _current(self) -> torch.cuda.Stream:
        """The stream of `COMPUTE`."""
        return torch.cuda.current_stream(self._device)
