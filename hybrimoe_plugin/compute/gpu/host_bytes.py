"""Where transfers read from: the mapped file's registered pages, else pinned staging buffers.

A driver or a sandbox may refuse to register pages of a mapped file. Then every transfer begins
with a copy in host memory, which is slower than the link, so another thread makes it
(`transfer_executor.ThreadExecutor`).
"""

from __future__ import annotations

import ctypes
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from hybrimoe_plugin.device.memory import huge_pages, human
from hybrimoe_plugin.device.streams import Event, Streams
from hybrimoe_plugin.weights.layer_weights import Bytes, LayerWeights

log = logging.getLogger(__name__)

_PAGE = 4096
READ_ONLY_PORTABLE = 8 | 1
"""cudaHostRegisterReadOnly, which a read-only mapping needs, and Portable, for several devices."""

PORTABLE = 1
"""Enough for the process's own memory, where the device does not know ReadOnly."""

_FEW = 0.01
"""Share of the weights that the caller itself may stage.

Such as a page that another device has registered.
"""


class HostBytes(Protocol):
    """Gives transfers tensors over stored bytes, in memory that the link reads at full speed."""

    def prepare(self, layers: Sequence[LayerWeights]) -> None:
        """Make the bytes of these layers, and of no others, ready to be read."""
        ...

    def address(self, part: Bytes) -> int | None:
        """Where the link reads these bytes at full speed; None where `source` must stage them.

        Valid from `prepare` until `release`.
        """
        ...

    def source(self, part: Bytes) -> torch.Tensor:
        """[part.size] uint8; if `reuses` is true then, valid until the event passed to `sent`."""
        ...

    @property
    def slow(self) -> bool:
        """Whether `source` takes so long that a separate thread should call it.

        Known after `prepare`.
        """
        ...

    @property
    def reuses(self) -> bool:
        """Whether the last source's memory is reused: then `sent` must follow."""
        ...

    def sent(self, event: Event) -> None:
        """Tell that the last `source` has been read once this event is reached."""
        ...

    def release(self) -> None:
        """Give back what `prepare` took."""
        ...


class PlainBytes:
    """The stored bytes themselves, for the emulated link."""

    slow = False
    reuses = False

    def prepare(self, layers: Sequence[LayerWeights]) -> None:
        """Nothing to do: nothing is pinned."""

    def address(self, part: Bytes) -> int | None:
        return int(part.ctypes.data)

    def source(self, part: Bytes) -> torch.Tensor:
        return as_tensor(part)

    def sent(self, event: Event) -> None:
        """Nothing to do: no memory is reused."""

    def release(self) -> None:
        """Nothing to do: nothing is held."""


class StagedBytes:
    """A ring of pinned buffers that bytes are copied through.

    Args:
        ring: number of buffers.
        pinned: False only in tests without CUDA.
        slow: whether to ask for a separate thread; False is the reference.
    """

    reuses = True

    def __init__(
        self, streams: Streams, ring: int = 8, pinned: bool = True, slow: bool = False
    ) -> None:
        self.slow = slow
        self._streams = streams
        self._count = ring
        self._pinned = pinned
        self._ring: list[torch.Tensor] = []
        self._free: list[Event | None] = [None] * ring
        self._last = -1

    def prepare(self, layers: Sequence[LayerWeights]) -> None:
        size = 0
        for weights in layers:
            size = max(size, *(part.size for part in weights.stored(0)))
        if not self._ring or self._ring[0].numel() < size:
            self._ring = [
                torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
                for _ in range(self._count)
            ]
            self._free = [None] * self._count

    def address(self, part: Bytes) -> int | None:
        return None

    def source(self, part: Bytes) -> torch.Tensor:
        self._last = (self._last + 1) % self._count
        free = self._free[self._last]
        if free is not None:
            self._streams.block(free)
        buffer = self._ring[self._last][: part.size]
        buffer.numpy()[:] = part
        return buffer

    def sent(self, event: Event) -> None:
        self._free[self._last] = event

    def release(self) -> None:
        self._ring.clear()


class RegisteredBytes:
    """Registers the pages of every expert with CUDA: one host copy serves CPU kernels and link.

    What the driver refuses goes through `staged`, with a notice.
    """

    def __init__(self, device: torch.device, staged: StagedBytes) -> None:
        self._device = device
        self._staged = staged
        self._wanted: list[tuple[int, int]] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        """First and last addresses of the registered ranges, in order."""
        self.slow = False
        self.reuses = False

    def prepare(self, layers: Sequence[LayerWeights]) -> None:
        wanted = list(_page_runs(layers))
        if wanted == self._wanted:
            return
        self.release()
        self._wanted = wanted
        for start, end in wanted:
            self._register_range(start, end)
        total = sum(end - start for start, end in wanted)
        registered = sum(self._ends) - sum(self._starts)
        refused = total - registered
        if not refused:
            return
        many = refused > _FEW * total
        self.slow = self._staged.slow and many
        log.warning(
            "%s of weights cannot be registered: their transfers are staged%s",
            human(refused),
            _advice(self._device) if many else "",
        )
        self._staged.prepare(layers)

    def address(self, part: Bytes) -> int | None:
        start = int(part.ctypes.data)
        at = bisect_right(self._starts, start) - 1
        registered = at >= 0 and start + part.size <= self._ends[at]
        return start if registered else None

    def source(self, part: Bytes) -> torch.Tensor:
        self.reuses = self.address(part) is None
        return self._staged.source(part) if self.reuses else as_tensor(part)

    def sent(self, event: Event) -> None:
        if self.reuses:
            self._staged.sent(event)

    def release(self) -> None:
        for start in self._starts:
            torch.cuda.cudart().cudaHostUnregister(start)
        self._wanted = []
        self._starts.clear()
        self._ends.clear()
        self.slow = False
        self._staged.release()

    def _register_range(self, start: int, end: int) -> None:
        """Register a range of pages, or all but its outer pages.

        Those may belong to a neighbour too, which another device has registered.
        """
        for first, last in ((start, end), (start + _PAGE, end - _PAGE)):
            if first < last and _register(first, last - first, self._device):
                self._starts.append(first)
                self._ends.append(last)
                return


def register_pages(start: int, nbytes: int, flags: int, device: torch.device) -> bool:
    """Register whole pages with the CUDA driver, which then copies from them without staging.

    Returns:
        False if the driver refuses.
    """
    status = torch.cuda.cudart().cudaHostRegister(start, nbytes, flags)
    if int(status) == 0:
        return True
    _clear_error(device)
    return False


def registers_own_memory(device: torch.device) -> bool:
    """Whether the driver registers the process's own memory; tried on one page."""
    memory = huge_pages(_PAGE)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    if not _register(start, _PAGE, device):
        return False
    torch.cuda.cudart().cudaHostUnregister(start)
    return True


def as_tensor(part: Bytes) -> torch.Tensor:
    """A tensor over bytes that may lie in a read-only mapping; it must only be read.

    Valid as long as `part`.
    """
    # By address: torch warns about every buffer that says it is read-only.
    memory = (ctypes.c_ubyte * part.size).from_address(part.ctypes.data)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _register(start: int, nbytes: int, device: torch.device) -> bool:
    if register_pages(start, nbytes, READ_ONLY_PORTABLE, device):
        return True
    return register_pages(start, nbytes, PORTABLE, device)


def _advice(device: torch.device) -> str:
    """End of the notice: which setting avoids staging, where one does."""
    if registers_own_memory(device):
        return "; the setting `weights: memory` avoids that"
    return ""


def _page_runs(layers: Sequence[LayerWeights]) -> Iterator[tuple[int, int]]:
    """Page-aligned (start, end) addresses of all experts.

    Neighbours are joined: a page may be registered only once.
    """
    spans = sorted(_page_span(block) for block in _blocks(layers))
    run_start, run_end = spans[0]
    for start, end in spans[1:]:
        if start <= run_end:
            run_end = max(run_end, end)
        else:
            yield run_start, run_end
            run_start, run_end = start, end
    yield run_start, run_end


def _blocks(layers: Sequence[LayerWeights]) -> Iterator[Bytes]:
    """All experts' bytes, in as few contiguous pieces as the file has."""
    for weights in layers:
        for matrix in weights.matrices():
            if matrix.stacked is not None:
                yield matrix.stacked
            elif matrix.spread is not None:
                yield matrix.spread
            else:
                yield from matrix.experts
        if weights.biases is not None:
            yield weights.biases.packed.reshape(-1).view(np.uint8)


def _page_span(block: Bytes) -> tuple[int, int]:
    """The whole pages that bytes lie on."""
    start = block.ctypes.data
    end = start + block.size
    return start // _PAGE * _PAGE, -(-end // _PAGE) * _PAGE


def _clear_error(device: torch.device) -> None:
    """Clear the runtime's last error, which the next kernel launch would report as its own."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        log.debug("cleared after a refused registration: %s", error)
