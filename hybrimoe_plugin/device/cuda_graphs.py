"""Capture device work once and replay it: CUDA graphs, behind a protocol that tests can fake."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from hybrimoe_plugin.device.cuda_timer import cuda_timer

Replay = Callable[[], None]
"""Repeats the captured work, on the memory that it had when it was captured."""


class Capture(Protocol):
    """Records work instead of doing it; several pieces may be recorded one after another."""

    def aside(self) -> AbstractContextManager[None]:
        """Enter the stream for warm-up and capture, ordered after all work queued so far.

        Work that is queued after the block comes after what was queued in it.
        """
        ...

    def begin(self) -> None:
        """Record work from now on."""
        ...

    def end(self) -> Replay:
        """The work since `begin`.

        Raises:
            RuntimeError: some of it cannot be recorded.
        """
        ...

    def abandon(self) -> None:
        """Forget the work since `begin`, if a capture is running."""
        ...

    def time_us(self, replay: Replay) -> float:
        """Time in us that one replay takes on the device; stops the host."""
        ...


class CudaCapture:
    """CUDA graphs of one device: captured on their own stream, replayed on the model's.

    All pieces share one memory pool. So they must be replayed in the order in which they were
    captured, and what a piece gives to a later one must stay alive while that one is captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._newest: torch.cuda.CUDAGraph | None = None
        """The last one that was captured.

        Without a living graph torch's allocator refuses the pool to the next one ("use_count > 0").
        """
        self._broken: list[torch.cuda.CUDAGraph] = []
        """Graphs whose capture failed.

        They must not be destroyed: torch's allocator may still ask them which stream they record.
        """

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        compute = torch.cuda.current_stream(self._device)
        collecting = gc.isenabled()
        # What a collection frees may call CUDA in ways that a capture forbids.
        gc.disable()
        self._stream.wait_stream(compute)  # edge: inputs are written -> warm-up and capture
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                yield
        finally:
            compute.wait_stream(self._stream)  # edge: warm-up is over -> replays
            if collecting:
                gc.enable()

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which collects garbage and empties the allocator for each of
        # some hundred pieces. "thread_local": other threads (the CPU experts' workers, timelines)
        # may keep calling CUDA.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Replay:
        graph, self._graph = self._graph, None
        assert graph is not None, "begin() comes first"
        try:
            graph.capture_end()
        except BaseException:
            self._keep(graph)
            raise
        self._newest = graph
        return graph.replay

    def abandon(self) -> None:
        if self._graph is not None:
            # An invalid capture ends with an error, but it ends.
            with contextlib.suppress(RuntimeError):
                self.end()

    def _keep(self, graph: torch.cuda.CUDAGraph) -> None:
        """Clean up after a capture that could not be ended.

        torch behaves as if the graph were still being captured, with the allocator bound to its
        pool. That pool would refuse every later capture ("already recording"), and freed memory
        would be held back until the end.
        """
        self._broken.append(graph)
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        # Not torch's public API, and torch may have ended the allocation itself.
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()

    def time_us(self, replay: Replay) -> float:
        return cuda_timer(self._device)(replay)


def capture_for(device: torch.device) -> Capture | None:
    """The capture of this device; None where nothing can be captured."""
    if device.type != "cuda":
        return None
    return CudaCapture(device)
