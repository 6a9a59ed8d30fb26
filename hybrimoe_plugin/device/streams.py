"""Queues of one device and the events between them: every cross-stream edge is one `wait`.

Four queues. `LINK` carries demand loads and `AHEAD` prefetches, so that neither waits for the
other's slots to be free. `REPACK` brings arrived bytes into slot form, so that a copy never waits
for a kernel. `COMPUTE` is whatever stream the model runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

LINK, AHEAD, REPACK, COMPUTE = "link", "ahead", "repack", "compute"
QUEUES = (LINK, AHEAD, REPACK, COMPUTE)

Event = Any
"""A point in a queue; made by `record`, only ever handed back."""


class Coming:
    """Tensors on their way to the CPU.

    Args:
        tensors: on the CPU; valid once all events have been reached.
    """

    def __init__(
        self, streams: Streams, tensors: list[torch.Tensor], events: Sequence[Event] = ()
    ) -> None:
        self._streams = streams
        self._tensors = tensors
        self._events = events

    def now(self) -> list[torch.Tensor] | None:
        """The tensors if they are there; the host does not wait."""
        return (
            self._tensors if all(self._streams.reached(event) for event in self._events) else None
        )

    def wait(self) -> list[torch.Tensor]:
        """The tensors; stops the host until they are there."""
        for event in self._events:
            self._streams.block(event)
        return self._tensors


class Streams(Protocol):
    """In-order queues: work of one queue runs in order, queues know of one another only by
    events.
    """

    def run(self, queue: str, work: Callable[[], None]) -> None:
        """Queue some work; it may only start device operations."""
        ...

    def record(self, queue: str) -> Event:
        """The point after everything queued so far."""
        ...

    def wait(self, queue: str, event: Event) -> None:
        """What is queued from now on runs after the event; the host does not wait."""
        ...

    def reached(self, event: Event) -> bool:
        """Whether the event lies in the past; the host does not wait."""
        ...

    def block(self, event: Event) -> None:
        """The host waits for the event."""
        ...

    def bring(self, tensors: Sequence[torch.Tensor]) -> Coming:
        """Queue copies to the CPU, behind what `COMPUTE` has been given so far; the host does not
        wait.
        """
        ...

    def landing(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory on the CPU that this tensor can be copied to without stopping the host."""
        ...

    def coming(self, landed: list[torch.Tensor]) -> Coming:
        """What work that `COMPUTE` has been given copies to the CPU."""
        ...

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on this device, for `COMPUTE`; the host does not wait."""
        ...

    def synchronize(self) -> None:
        """The host waits for everything."""
        ...


class HostStreams:
    """Everything at once, on the CPU: the emulated device."""

    def run(self, queue: str, work: Callable[[], None]) -> None:
        work()

    def record(self, queue: str) -> Event:
        return None

    def wait(self, queue: str, event: Event) -> None:
        """Everything queued before has run."""

    def reached(self, event: Event) -> bool:
        return True

    def block(self, event: Event) -> None:
        """Everything queued before has run."""

    def bring(self, tensors: Sequence[torch.Tensor]) -> Coming:
        return Coming(self, [tensor.to("cpu") for tensor in tensors])

    def landing(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu")

    def coming(self, landed: list[torch.Tensor]) -> Coming:
        return Coming(self, landed)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def synchronize(self) -> None:
        """Nothing runs on."""


class CudaStreams:
    """One CUDA stream for each queue; `COMPUTE` is torch's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Lower numbers go first, but among kernels only: copies cross the link as they came, see
        # `AHEAD_DEPTH`.
        self._streams = {
            LINK: torch.cuda.Stream(device, priority=-2),
            AHEAD: torch.cuda.Stream(device, priority=0),
            REPACK: torch.cuda.Stream(device, priority=-2),
        }

    def run(self, queue: str, work: Callable[[], None]) -> None:
        if queue == COMPUTE:
            work()
            return
        with torch.cuda.stream(self._streams[queue]):
            work()

    def record(self, queue: str) -> Event:
        event = torch.cuda.Event()
        event.record(self._stream(queue))
        return event

    def wait(self, queue: str, event: Event) -> None:
        self._stream(queue).wait_event(event)

    def reached(self, event: Event) -> bool:
        return bool(event.query())

    def block(self, event: Event) -> None:
        event.synchronize()

    def bring(self, tensors: Sequence[torch.Tensor]) -> Coming:
        found = []
        devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
        for tensor in tensors:
            if tensor.device.type == "cuda":
                # On the tensor's own device, after what made it.
                tensor = self.landing(tensor).copy_(tensor, non_blocking=True)
            found.append(tensor)
        events = []
        for device in devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events.append(event)
        return Coming(self, found, events)

    def landing(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def coming(self, landed: list[torch.Tensor]) -> Coming:
        return Coming(self, landed, [self.record(COMPUTE)])

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        # The caching host allocator gives the pinned copy's memory away only once the transfer is
        # over.
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def _stream(self, queue: str) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if queue == COMPUTE else self._streams[queue]
