"""Slot ids of one token on their way to the device: the same few numbers in every layer call.

They are written into pinned memory that is kept, and copied with one call. The device may read that
memory long after the call, so copies are made from its places in turn:

    places      | first half ... | second half ... |
    host        writes here      ^ on crossing: an event behind all copies from the half it leaves,
                                   and a look at the one from when it last left the other half
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch

from hybrimoe_plugin.device.streams import COMPUTE, Event, Streams

HALF = 32
"""Places of one half: so many copies to one event, which the device has reached long since."""


class SlotIds:
    """Sends the slot ids of one token's waves.

    Args:
        streams: the device's queues.
        device: where the ids go.
    """

    def __init__(self, streams: Streams, device: torch.device) -> None:
        self._streams = streams
        self._device = device
        self._rings: dict[tuple[int, int], _Ring] = {}
        """(waves, experts of a token) -> the memory for them."""

    def send(self, ids: Sequence[int], waves: int) -> tuple[torch.Tensor, ...]:
        """As `Accelerator.send_slot_ids` says."""
        shape = waves, len(ids) // waves
        ring = self._rings.get(shape)
        if ring is None:
            ring = self._rings[shape] = _Ring(self._streams, self._device, *shape)
        return ring.send(ids)


class _Ring:
    """Pinned memory for ids of one shape, [W, 1, K]."""

    def __init__(self, streams: Streams, device: torch.device, waves: int, top_k: int) -> None:
        self._streams = streams
        with torch.inference_mode(False):
            self._there = torch.empty(waves, 1, top_k, dtype=torch.int64, device=device)
            places = torch.empty(2 * HALF, waves, 1, top_k, dtype=torch.int64)
            pinned = streams.pinned_like(places)
            self._waves = self._there.unbind()
            self._here = pinned.unbind()
        self._written = pinned.numpy().view(np.uint8).ravel()
        self._format = struct.Struct(f"{waves * top_k}q")
        self._next = 0
        self._left: list[Event | None] = [None, None]
        """For each half, an event behind every copy that was made from it before it was left."""

    def send(self, ids: Sequence[int]) -> tuple[torch.Tensor, ...]:
        place = self._next
        if place % HALF == 0:
            self._enter(place // HALF)
        # Before the copy: its place is used up, wherever this ends.
        self._next = (place + 1) % (2 * HALF)
        self._format.pack_into(self._written, place * self._format.size, *ids)
        self._there.copy_(self._here[place], non_blocking=True)
        return self._waves

    def _enter(self, half: int) -> None:
        """Leave the other half for this one, once the device has read what was written here."""
        streams = self._streams
        self._left[1 - half] = streams.record(COMPUTE)
        last = self._left[half]
        if last is not None and not streams.reached(last):
            streams.block(last)  # edge: the last copies from this half -> the host writes there
