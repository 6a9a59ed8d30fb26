"""Is every use of a slot ordered after what wrote it, and every write after the last use?

Streams have vector clocks, which events carry from one to the other. Two accesses to the same
memory, one of which writes, must be ordered by a chain of events, however late the device is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch

HOST = "host"
PAGE = 1 << 18
"""Bytes."""

Clock = dict[str, int]
"""How much of each stream has happened before something."""


class Access(NamedTuple):
    """One operation's use of a range of memory."""

    stream: str
    clock: Clock
    write: bool
    start: int
    end: int

    def before(self, other: Access) -> bool:
        """Whether events order it before another."""
        return self.clock[self.stream] <= other.clock.get(self.stream, 0)

    def meets(self, other: Access) -> bool:
        """Whether the order of the two matters."""
        overlaps = self.start < other.end and other.start < self.end
        return overlaps and (self.write or other.write)


class Edges:
    """The order of what streams do, as far as events say it.

    Attributes:
        checked: how often the order of two accesses mattered, and was right.
    """

    def __init__(self) -> None:
        self.checked = 0
        self._clocks: dict[str, Clock] = defaultdict(dict)
        self._pages: dict[int, list[Access]] = defaultdict(list)
        """Accesses by the parts of memory that they touch, so that few are looked at."""

    def point(self, stream: str) -> Clock:
        """What has happened once all work of a stream so far is done."""
        return dict(self._clocks[stream])

    def wait(self, stream: str, point: Clock) -> None:
        """What a stream, or `HOST`, does from now on comes after this point."""
        clock = self._clocks[stream]
        for name, count in point.items():
            clock[name] = max(clock.get(name, 0), count)

    def wait_for_all(self) -> None:
        """The host waits for the device."""
        for stream in list(self._clocks):
            self.wait(HOST, self._clocks[stream])

    def known(self, point: Clock) -> bool:
        """Whether the host has waited for this point, directly or not."""
        clock = self._clocks[HOST]
        return all(clock.get(name, 0) >= count for name, count in point.items())

    def use(self, stream: str, start: int, end: int, write: bool) -> None:
        """Work that is queued now uses this memory.

        Raises:
            RuntimeError: another use of it may come at the same time.
        """
        self.wait(stream, self._clocks[HOST])
        clock = self._clocks[stream]
        clock[stream] = clock.get(stream, 0) + 1
        now = Access(stream, dict(clock), write, start, end)
        for page in range(start // PAGE, (end - 1) // PAGE + 1):
            self._pages[page] = [*self._ordered(self._pages[page], now), now]

    def _ordered(self, earlier: Sequence[Access], now: Access) -> Iterator[Access]:
        """Check an access against earlier ones; gives those that later ones must still meet."""
        for old in earlier:
            if old.meets(now):
                if not old.before(now):
                    raise RuntimeError(f"nothing orders {old} before {now}")
                self.checked += 1
            # What comes after this access comes after one that it covers, too.
            covered = now.start <= old.start and old.end <= now.end and old.before(now)
            if not (covered and (now.write or (not old.write and old.stream == now.stream))):
                yield old


class Addresses:
    """Distinct addresses for tensors of a device that has no memory."""

    def __init__(self) -> None:
        self._bases: dict[int, tuple[torch.Tensor, int]] = {}
        """Storage -> a tensor that keeps it alive, its address."""
        self._next = 1 << 40

    @contextmanager
    def given(self) -> Iterator[None]:
        """Let `Tensor.data_ptr` tell them."""
        plain = torch.Tensor.data_ptr

        def data_ptr(tensor: torch.Tensor) -> int:
            return self.of(tensor) if tensor.is_meta else plain(tensor)

        with mock.patch.object(torch.Tensor, "data_ptr", data_ptr):
            yield

    def of(self, tensor: torch.Tensor) -> int:
        """Where a tensor begins; the same for all views of one place."""
        storage = tensor.untyped_storage()
        known = self._bases.get(storage._cdata)
        if known is None:
            known = self._bases[storage._cdata] = tensor, self._next
            self._next += storage.nbytes() // 4096 * 4096 + 8192
        return known[1] + int(tensor.storage_offset()) * tensor.element_size()
