"""Entries of several sequences side by side in memory, so that one kernel attends over all of them.

    slot 0   | entries of A ......... | spare ....... |
    slot 1   | entries of B .. | spare .............. |     keys [slots, heads, capacity, D]
    slot 2   | entries of C ............. | spare ... |

A sequence's cache goes on as before: the buffers of its layers are its slot, until they are too
small, or until it leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import Buffers, GrowingLayer, make_buffer

MOST_BYTES = 256 << 20
"""Of a shelf. Where more is held, a row's attention takes longer than what starting it costs."""

SPARE = 256
"""Tokens of spare capacity of a new shelf."""


class Shelf:
    """Slots for the sequences of a pass, in the order of the slots from the first on.

    Args:
        like: the growing layers of one sequence.
        slots: how many sequences there is room for.
        capacity: tokens of a slot.

    Attributes:
        buffers: of each layer, keys and values [slots, heads, capacity, D].
    """

    def __init__(self, like: Sequence[GrowingLayer], slots: int, capacity: int) -> None:
        self.capacity = capacity
        self.buffers: list[Buffers] = []
        self._views: list[list[Buffers]] = []
        self._caches: list[Any] = [None] * slots
        """Who lies in each slot; None where it is free."""
        for layer in like:
            parts = (part.expand(slots, -1, -1, -1) for part in (layer.keys, layer.values))
            keys, values = (make_buffer(part, capacity) for part in parts)
            self.buffers.append((keys, values))
            self._views.append(list(zip(keys.split(1), values.split(1), strict=True)))

    @property
    def is_empty(self) -> bool:
        return all(cache is None for cache in self._caches)

    def suits(self, caches: Sequence[Any]) -> bool:
        """Whether these sequences fit, with another token of each, and do not leave most of it
        empty.
        """
        lengths = [int(cache.get_seq_length()) for cache in caches]
        slots, count, longest = len(self._caches), len(caches), max(lengths)
        if count > slots or longest >= self.capacity or not _are_alike(lengths):
            return False
        is_filled = slots * self.capacity <= 4 * count * (longest + SPARE)
        return is_filled and all(map(_can_move, caches))

    def arrange(self, caches: Sequence[Any]) -> list[Any]:
        """Let these sequences lie in the first slots, and no others in any; in the slots' order.

        Mutates: the caches, whose entries are copied where they lie elsewhere.
        """
        for cache in self._caches:
            if cache is not None and cache not in caches:
                self.release(cache)
        count = len(caches)
        elsewhere = [cache for cache in caches if cache not in self._caches[:count]]
        for slot in range(count):
            if self._caches[slot] is None:
                self._move(elsewhere.pop(0), slot)
            else:
                self._move(self._caches[slot], slot)  # it may have outgrown an earlier one
        return self._caches[:count]

    def release(self, cache: Any) -> None:
        """Give a sequence memory of its own, if it lies here."""
        for slot, held in enumerate(self._caches):
            if held is cache:
                for layer, views in zip(cache.layers, self._views, strict=True):
                    if layer.touches(views[slot]):
                        layer.leave()
                self._caches[slot] = None

    def forget(self, cache: Any) -> None:
        """Free the slot of a sequence that nobody will use any more."""
        for slot, held in enumerate(self._caches):
            if held is cache:
                self._caches[slot] = None

    def clear(self) -> None:
        """Give every sequence memory of its own."""
        for cache in self._caches:
            if cache is not None:
                self.release(cache)

    def _move(self, cache: Any, slot: int) -> None:
        for layer, views in zip(cache.layers, self._views, strict=True):
            if layer.lies_in(views[slot]):
                continue
            held = layer.get_seq_length()
            layer.move(views[slot])
            # A mask hides what others have left behind, but not if it is no number.
            for buffer in views[slot]:
                buffer.narrow(2, held, self.capacity - held).zero_()
        self._caches[slot] = cache
        for place, lying in enumerate(self._caches):
            if lying is cache and place != slot:
                self._caches[place] = None


def shelf_for(caches: Sequence[Any]) -> Shelf | None:
    """A new shelf for sequences with entries; None where one does not pay."""
    if not all(map(_can_move, caches)):
        return None
    lengths = [int(cache.get_seq_length()) for cache in caches]
    if not _are_alike(lengths):
        return None
    longest, count = max(lengths), len(caches)
    slots, capacity = 1 << (count - 1).bit_length(), longest + SPARE
    layers = caches[0].layers
    token = sum(part[:, :, :1].nbytes for layer in layers for part in (layer.keys, layer.values))
    if slots * capacity * token > MOST_BYTES:
        return None
    return Shelf(layers, slots, capacity)


class Places:
    """Where the new tokens of one pass go on a shelf, and what each of them sees.

    Args:
        lengths: tokens that each sequence holds, in the order of the slots.
        dtype: of queries.
    """

    def __init__(self, lengths: Sequence[int], dtype: torch.dtype) -> None:
        self.seen = max(lengths) + 1
        self._slots = torch.arange(len(lengths))
        self._lengths = torch.tensor(lengths)
        self.mask: torch.Tensor | None = None
        """[R, 1, 1, seen] to be added to scores; None where all see as much."""
        if min(lengths) + 1 < self.seen:
            hidden = torch.arange(self.seen) > self._lengths[:, None]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            self.mask = mask[:, None, None]

    def append(self, buffers: Buffers, key: torch.Tensor, value: torch.Tensor) -> Buffers:
        """Write [R, heads, 1, D]; all keys and values [R, heads, seen, D]. Mutates: the buffers."""
        count = len(self._slots)
        found = []
        for buffer, new in zip(buffers, (key, value), strict=True):
            if buffer.shape[3]:  # latent attention has no values
                buffer[self._slots, :, self._lengths] = new[:, :, 0]
            found.append(buffer[:count, :, : self.seen])
        keys, values = found
        return keys, values


def _are_alike(lengths: Sequence[int]) -> bool:
    """Attention over a shelf reads as much for each sequence as for the longest."""
    return len(lengths) * max(lengths) <= 2 * sum(lengths)


def _can_move(cache: Any) -> bool:
    """Whether a cache's layers can lie on a shelf; on a GPU that was never measured."""
    return all(type(layer) is GrowingLayer and layer.keys.is_cpu for layer in cache.layers)
