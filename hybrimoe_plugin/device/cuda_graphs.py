"""Capturing device work once and replaying it: CUDA graphs, behind a protocol that tests
can play.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from hybrimoe_plugin.device.cuda_timer import cuda_timer

Replay = Callable[[], None]
"""Does the captured work again, on the memory that it had when it was captured."""


class Capture(Protocol):
    """Records work instead of doing it; several pieces may be recorded one after another."""

    def aside(self) -> AbstractContextManager[None]:
        """Where warming up and capturing happen: after all work given so far, before all that
        comes.
        """
        ...

    def begin(self) -> None:
        """From now on work is recorded."""
        ...

    def end(self) -> Replay:
        """The work since `begin`. Raises: RuntimeError: some of it cannot be recorded."""
        ...

    def abandon(self) -> None:
        """Forget the work since `begin`, if there is any."""
        ...

    def time_us(self, replay: Replay) -> float:
        """How long one replay takes on the device; stops the host."""
        ...


class CudaCapture:
    """CUDA graphs of one device; captured on a stream of their own, replayed on the stream the
    model runs on.

    All pieces share one pool of memory, so they must be replayed in the order in which they were
    captured, and what a piece gives to a later one must be kept while that is captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._broken: list[torch.cuda.CUDAGraph] = []
        """Graphs whose capture ended with an error. torch's allocator may still ask them which
        stream they record, so they must not be destroyed.
        """

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        compute = torch.cuda.current_stream(self._device)
        collecting = gc.isenabled()
        gc.disable()  # what a collection frees may call CUDA in ways that a capture forbids
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
        # Not `torch.cuda.graph`, which collects garbage and empties the allocator for each of some
        # hundred pieces. Other threads (CPU experts' workers, timelines) may go on with what they
        # do.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Replay:
        graph, self._graph = self._graph, None
        assert graph is not None, "begin() comes first"
        try:
            graph.capture_end()
        except BaseException:
            self._keep(graph)
            raise
        return graph.replay

    def abandon(self) -> None:
        if self._graph is not None:
            with contextlib.suppress(
                RuntimeError
            ):  # an invalid capture ends with an error, but it ends
                self.end()

    def _keep(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a failed end: torch goes on as if the graph were being captured, with the allocator
        bound to its pool.

        That pool would refuse every later capture ("already recording"), and freed memory would
        wait for the end.
        """
        self._broken.append(graph)
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with contextlib.suppress(
            AttributeError, RuntimeError
        ):  # not torch's public API; or it has ended it itself
            torch._C._cuda_endAllocateToPool(index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()

    def time_us(self, replay: Replay) -> float:
        return cuda_timer(self._device)(replay)


def capture_for(device: torch.device) -> Capture | None:
    """What captures on this device; None where nothing can."""
    return CudaCapture(device) if device.type == "cuda" else None
