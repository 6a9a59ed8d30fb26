"""Where transfers read from: the mapped file's own pages, registered with the driver, else pinned
staging buffers.

A driver or a sandbox may refuse to register pages of a mapped file. Then every transfer is a copy
in host memory first, which is slower than the link, so another thread makes it (`issue.OnThread`).
"""

from __future__ import annotations

import ctypes
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from hybrimoe_plugin.device.memory import huge_pages, human
from hybrimoe_plugin.device.streams import Event, Streams
from hybrimoe_plugin.weights.layer_weights import Bytes, LayerWeights

log = logging.getLogger(__name__)

_PAGE = 4096
READ_ONLY_PORTABLE = 8 | 1
"""cudaHostRegisterReadOnly, which a read-only file mapping needs, and Portable: several devices
read one file.
"""

PORTABLE = 1
"""Enough for memory of the process's own, where the device does not know ReadOnly."""

_FEW = 0.01
"""Share of the weights that may be staged by the caller itself, such as a page that another device
has registered.
"""


class HostBytes(Protocol):
    """Gives transfers tensors over stored bytes, in memory that the link reads at full speed."""

    def prepare(self, layers: Sequence[LayerWeights]) -> None: ...

    def source(self, part: Bytes) -> torch.Tensor:
        """[part.size] uint8; where `reuses` says so, valid until the event that `sent` is told."""
        ...

    @property
    def slow(self) -> bool:
        """Whether `source` takes so long that a thread of its own should call it; known after
        `prepare`.
        """
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

    slow = False
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
    """A ring of buffers that bytes are copied through.

    Args:
        pinned: False only in tests without CUDA.
        slow: whether to ask for a thread of its own; False is the plain twin.
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
        self._turn = -1

    def prepare(self, layers: Sequence[LayerWeights]) -> None:
        size = max(matrix.experts[0].size for weights in layers for matrix in weights.matrices())
        if not self._ring or self._ring[0].numel() < size:
            self._ring = [
                torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
                for _ in range(self._count)
            ]
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
    """Registers the pages of every expert with CUDA, so that the one host copy serves CPU kernels
    and link.

    What the driver refuses goes through `staged`, with a notice.
    """

    def __init__(self, device: torch.device, staged: StagedBytes) -> None:
        self._device = device
        self._staged = staged
        self._wanted: list[tuple[int, int]] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.slow = False
        self.reuses = False

    def prepare(self, layers: Sequence[LayerWeights]) -> None:
        wanted = list(_page_runs(layers))
        if wanted == self._wanted:
            return
        self.release()
        self._wanted = wanted
        for start, end in wanted:
            # The outer pages may belong to a neighbour too, which another device has registered:
            # then without them.
            for first, last in ((start, end), (start + _PAGE, end - _PAGE)):
                if first < last and _register(first, last - first, self._device):
                    self._starts.append(first)
                    self._ends.append(last)
                    break
        total = sum(end - start for start, end in wanted)
        refused = total - sum(self._ends) + sum(self._starts)
        if refused:
            self.slow = self._staged.slow and refused > _FEW * total
            advice = _advice(self._device) if refused > _FEW * total else ""
            log.warning(
                "%s of weights cannot be registered: their transfers are staged%s",
                human(refused),
                advice,
            )
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
        self._wanted = []
        self._starts.clear()
        self._ends.clear()
        self.slow = False
        self._staged.release()


def register_pages(start: int, nbytes: int, flags: int, device: torch.device) -> bool:
    """Register whole pages with the CUDA driver, which then copies from them without staging; False
    if it refuses.
    """
    if int(torch.cuda.cudart().cudaHostRegister(start, nbytes, flags)) == 0:
        return True
    _clear_error(device)
    return False


def registers_own_memory(device: torch.device) -> bool:
    """Whether the driver registers memory of the process's own; tried on a page."""
    memory = huge_pages(_PAGE)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    if not _register(start, _PAGE, device):
        return False
    torch.cuda.cudart().cudaHostUnregister(start)
    return True


def as_tensor(part: Bytes) -> torch.Tensor:
    """A tensor over bytes that may lie in a read-only mapping; it is only ever read. Valid as long
    as `part`.
    """
    # By address: torch warns about every buffer that says it is read-only.
    return torch.frombuffer(
        (ctypes.c_ubyte * part.size).from_address(part.ctypes.data), dtype=torch.uint8
    )


def _register(start: int, nbytes: int, device: torch.device) -> bool:
    return any(
        register_pages(start, nbytes, flags, device) for flags in (READ_ONLY_PORTABLE, PORTABLE)
    )


def _advice(device: torch.device) -> str:
    """What makes transfers faster than staging, where anything does."""
    return "; the setting `weights: memory` avoids that" if registers_own_memory(device) else ""


def _page_runs(layers: Sequence[LayerWeights]) -> Iterator[tuple[int, int]]:
    """Page-aligned (start, end) of all experts, neighbours joined: a page may be registered once
    only.
    """
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
    """A refused registration stays as the runtime's last error, and the next kernel launch would
    report it.
    """
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        log.debug("cleared after a refused registration: %s", error)
