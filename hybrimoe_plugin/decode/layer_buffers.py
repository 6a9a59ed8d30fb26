"""The KV cache of one layer at fixed addresses, and the sequence that lies in it."""

from __future__ import annotations

import weakref

import torch

from hybrimoe_plugin.compute.attention.kv_cache import Buffers, GrowingLayer, make_buffer

FIRST_CAPACITY = 256
"""Tokens in a layer's first buffers. Full ones are replaced by some of twice the capacity, and the
layer is captured again.
"""


class LayerBuffers:
    """Buffers for the keys and values of one sequence at a time.

    Graphs read one set of addresses, so the sequence that is decoded must lie there. Another one
    that did before continues in buffers of its own:

        A decodes   buffers: A
        B decodes   buffers: B      A moved out, to its own
        A decodes   buffers: A      B moved out; A was copied back

    Args:
        context: tokens that the user asked for; no more capacity is taken unless they are exceeded.

    Attributes:
        kv: None until the first sequence.
    """

    def __init__(self, context: int) -> None:
        self.kv: Buffers | None = None
        self._context = context
        self._owner: weakref.ref[GrowingLayer] | None = None

    def take(self, cache: GrowingLayer) -> None:
        """Move a sequence into the buffers, or into new ones if they are full. Mutates: `cache`."""
        held = cache.get_seq_length()
        kv = self.kv
        if kv is not None and held < kv[0].shape[2] and cache.lies_in(kv):
            return
        self._move_others_out(cache)
        if self.kv is None or not self._has_space(held) or not _fits(self.kv, cache):
            capacity = self._capacity_for(held)
            keys = make_buffer(cache.keys, capacity)
            values = make_buffer(cache.values, capacity)
            self.kv = keys, values
        self._owner = weakref.ref(cache)  # before its move, which may be interrupted
        cache.move(self.kv)

    def _move_others_out(self, cache: GrowingLayer) -> None:
        """Let the sequence that has the buffers continue in its own: it may go on later."""
        if self._owner is None:
            return
        owner = self._owner()
        if owner is None or owner is cache:
            return
        if owner.touches(self.kv):
            owner.leave()

    def _has_space(self, held: int) -> bool:
        """Whether one more token fits behind those held."""
        return self.kv is not None and held < self.kv[0].shape[2]

    def _capacity_for(self, held: int) -> int:
        capacity = FIRST_CAPACITY
        while capacity <= held:
            capacity *= 2
        if held < self._context < capacity:
            return self._context  # memory was left free for so many tokens, and no more
        return capacity


def _fits(buffers: Buffers, cache: GrowingLayer) -> bool:
    """Whether the buffers are of the cache's batch size, heads, widths and type."""
    keys, values = buffers
    return _alike(keys, cache.keys) and _alike(values, cache.values)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape[:2] != other.shape[:2]:
        return False
    return one.shape[3] == other.shape[3]
