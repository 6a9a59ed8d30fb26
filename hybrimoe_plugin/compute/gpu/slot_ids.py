"""Slot ids of a few tokens on their way to the device: a few numbers in every layer call.

They are written into pinned memory that is kept, and copied with one call. The device may read that
memory long after the call, so the host writes to its places in turn. When it goes from one half of
them to the other, it leaves an event behind all copies from the first, and looks at the one that it
left behind the second half's last copies:

    host       | first half | second half   | first half                        | ...
    COMPUTE    | copies     | E1 | copies   | E2 | copies
    asked                                   ^ E1                                ^ E2
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.device.streams import COMPUTE, Event, Streams

HALF = 32
"""Places of one half: so many copies to one event, which the device has reached long since."""


class SlotIdSenders:
    """What sends the slot ids of calls of each shape."""

    def __init__(self, streams: Streams, device: torch.device) -> None:
        self._streams = streams
        self._device = device
        self._senders: dict[tuple[int, int, int], SlotIds] = {}

    def of(self, waves: int, tokens: int, top_k: int) -> SlotIds:
        """For calls [W, T, K]; those of nearly as many tokens share one, so that there are few."""
        shape = waves, 1 << (tokens - 1).bit_length(), top_k
        sender = self._senders.get(shape)
        if sender is None:
            sender = self._senders[shape] = SlotIds(self._streams, self._device, shape)
        return sender


class SlotIds:
    """Sends the slot ids of a call's waves.

    Args:
        streams: the device's queues.
        device: where the ids go.
        shape: of what is sent, [W, T, K]: that of the calls, or with more tokens than theirs.
    """

    def __init__(self, streams: Streams, device: torch.device, shape: tuple[int, int, int]) -> None:
        self._streams = streams
        with torch.inference_mode(False):
            self._there = torch.empty(shape, dtype=torch.int64, device=device)
            here = streams.pinned_like(torch.empty(2 * HALF, *shape, dtype=torch.int64))
        self._waves = self._there.unbind()
        self._first: dict[int, tuple[torch.Tensor, ...]] = {}
        """Number of tokens -> each wave's ids of so many."""
        self._here = here.unbind()
        self._arrays = here.numpy()
        self._written = memoryview(here.numpy()).cast("B")
        self._format = struct.Struct(f"{self._there.numel()}q")
        self._sent = 0
        self._left: list[Event | None] = [None, None]
        """For each half, an event behind every copy that was made from it before it was left."""

    def send(self, ids: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """[T, K] on the device for each wave. Valid until the next call.

        Args:
            ids: T * K for each wave, one wave after the other.
        """
        place = self._next_place()
        self._format.pack_into(self._written, place * self._format.size, *ids)
        self._there.copy_(self._here[place], non_blocking=True)
        return self._waves

    def send_table(self, ids: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """The same for ids [W, T', K] of at most T tokens: [T', K] for each wave."""
        place = self._next_place()
        tokens = ids.shape[1]
        self._arrays[place, :, :tokens] = ids
        self._there.copy_(self._here[place], non_blocking=True)
        first = self._first.get(tokens)
        if first is None:
            first = self._first[tokens] = tuple(wave[:tokens] for wave in self._waves)
        return first

    def _next_place(self) -> int:
        """Where the host may write now; its own from here on, wherever the call ends."""
        sent = self._sent
        if sent and sent % HALF == 0:
            self._cross(sent // HALF % 2)
        self._sent = sent + 1
        return sent % (2 * HALF)

    def _cross(self, half: int) -> None:
        """Leave the other half for this one, once the device has read what was written here."""
        streams = self._streams
        self._left[1 - half] = streams.record(COMPUTE)
        last = self._left[half]
        if last is not None and not streams.reached(last):
            streams.block(last)  # edge: the last copies from this half -> the host writes there
