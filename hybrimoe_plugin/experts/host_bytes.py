"""Where transfers read from: the mapped file's own pages, registered with the driver, else pinned staging buffers."""

from __future__ import annotations

import ctypes
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from hybrimoe_plugin.experts.streams import Event, Streams
from hybrimoe_plugin.experts.weights import Bytes, LayerWeights

log = logging.getLogger(__name__)

_PAGE = 4096
_FLAGS = 8 | 1
"""cudaHostRegisterReadOnly, which a read-only file mapping needs, and Portable: several devices read one file."""


class HostBytes(Protocol):
    """Gives transfers tensors over stored bytes, in memory that the link reads at full speed."""

    def prepare(self, layers: Sequence[LayerWeights]) -> None: ...

    def source(self, part: Bytes) -> torch.Tensor:
        """[part.size] uint8; where `reuses` says so, valid until the event that `sent` is told."""
        ...

    @property
    def reuses(self) -> bool:
        """Whether the last source's memory is filled again: then `sent` must follow."""
        ...

    def sent(self, event: Event) -> None:
        """The last `source` has been read once this event is reached."""
        ...

    def release(self) -> None: ...


class PlainBytes:
    """The bytes as they are: the emulated link."""

    reuses = False

    def prepare(self, layers: Sequence[LayerWeights]) -> None:
        """Nothing to pin."""

    def source(self, part: Bytes) -> torch.Tensor:
        return as_tensor(part)

    def sent(self, event: Event) -> None:
        """Nothing is reused."""

    def release(self) -> None:
        """Nothing is held."""


class StagedBytes:
    """A ring of buffers that bytes are copied through; `pinned` is False only in tests without CUDA."""

    reuses = True

    def __init__(self, streams: Streams, ring: int = 8, pinned: bool = True) -> None:
        self._streams = streams
        self._count = ring
        self._pinned = pinned
        self._ring: list[torch.Tensor] = []
        self._free: list[Event | None] = [None] * ring
        self._turn = -1

    def prepare(self, layers: Sequence[LayerWeights]) -> None:
        size = max(matrix.experts[0].size for weights in layers for matrix in weights.matrices())
        if not self._ring or self._ring[0].numel() < size:
            self._ring = [torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(self._count)]
            self._free = [None] * self._count

    def source(self, part: Bytes) -> torch.Tensor:
        self._turn = (self._turn + 1) % self._count
        free = self._free[self._turn]
        if free is not None:
            self._streams.block(free)
        buffer = self._ring[self._turn][: part.size]
        buffer.numpy()[:] = part
        return buffer

    def sent(self, event: Event) -> None:
        self._free[self._turn] = event

    def release(self) -> None:
        self._ring.clear()


class RegisteredBytes:
    """Registers the pages of every expert with CUDA, so that the one host copy serves CPU kernels and link.

    What the driver refuses goes through `staged`, with a notice.
    """

    def __init__(self, device: torch.device, staged: StagedBytes) -> None:
        self._device = device
        self._staged = staged
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.reuses = False

    def prepare(self, layers: Sequence[LayerWeights]) -> None:
        wanted = list(_page_runs(layers))
        if wanted == list(zip(self._starts, self._ends, strict=True)):
            return
        self.release()
        refused = 0
        for start, end in wanted:
            # The outer pages may belong to a neighbour too, which another device has registered: then without them.
            for first, last in ((start, end), (start + _PAGE, end - _PAGE)):
                if first < last and register_pages(first, last - first, _FLAGS, self._device):
                    self._starts.append(first)
                    self._ends.append(last)
                    break
                refused += 1
        if refused:
            size = sum(end - start for start, end in wanted) - sum(self._ends) + sum(self._starts)
            log.warning("%.1f MiB of weights cannot be registered: their transfers are staged", size / 2**20)
            self._staged.prepare(layers)

    def source(self, part: Bytes) -> torch.Tensor:
        start = part.ctypes.data
        at = bisect_right(self._starts, start) - 1
        self.reuses = at < 0 or self._ends[at] < start + part.size
        return self._staged.source(part) if self.reuses else as_tensor(part)

    def sent(self, event: Event) -> None:
        if self.reuses:
            self._staged.sent(event)

    def release(self) -> None:
        for start in self._starts:
            torch.cuda.cudart().cudaHostUnregister(start)
        self._starts.clear()
        self._ends.clear()
        self._staged.release()


def register_pages(start: int, nbytes: int, flags: int, device: torch.device) -> bool:
    """Register whole pages with the CUDA driver, which then copies from them without staging; False if it refuses."""
    if int(torch.cuda.cudart().cudaHostRegister(start, nbytes, flags)) == 0:
        return True
    _clear_error(device)
    return False


def as_tensor(part: Bytes) -> torch.Tensor:
    """A tensor over bytes that may lie in a read-only mapping; it is only ever read. Valid as long as `part`."""
    # By address: torch warns about every buffer that says it is read-only.
    return torch.frombuffer((ctypes.c_ubyte * part.size).from_address(part.ctypes.data), dtype=torch.uint8)


def _page_runs(layers: Sequence[LayerWeights]) -> Iterator[tuple[int, int]]:
    """Page-aligned (start, end) of all experts, neighbours joined: a page may be registered once only."""
    spans = []
    for matrix in (matrix for weights in layers for matrix in weights.matrices()):
        for block in [matrix.stacked] if matrix.stacked is not None else matrix.experts:
            start = block.ctypes.data
            spans.append((start // _PAGE * _PAGE, -(-(start + block.size) // _PAGE) * _PAGE))
    spans.sort()
    current = spans[0]
    for start, end in spans[1:]:
        if start <= current[1]:
            current = current[0], max(current[1], end)
        else:
            yield current
            current = start, end
    yield current


def _clear_error(device: torch.device) -> None:
    """A refused registration stays as the runtime's last error, and the next kernel launch would report it."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        log.debug("cleared after a refused registration: %s", error)
