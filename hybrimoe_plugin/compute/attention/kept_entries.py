"""Which entries of a KV cache are kept, whatever interrupts the passes behind them."""

from __future__ import annotations

import copy
from typing import Any

from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from hybrimoe_plugin.compute.attention.kv_cache import GrowingLayer


def can_be_cut(layer: Any) -> bool:
    """Whether a cache's layer holds keys and values of all tokens and nothing else, so that the
    entries behind any token can be dropped.
    """
    # Exact types: what a subclass keeps besides keys and values is unknown here.
    return type(layer) in (DynamicLayer, GrowingLayer)


def cut_entries(layer: Any, count: int) -> None:
    """Keep the first entries of a layer that can be cut and has at least as many.

    For callers who know that nobody holds those behind: the next ones may be written over them.
    """
    if isinstance(layer, GrowingLayer):
        layer.cut(count)
    else:
        layer.keys = layer.keys[:, :, :count]
        layer.values = layer.values[:, :, :count]


class KeptEntries:
    """The first entries of a KV cache: those of accepted tokens.

    What lies behind them can be dropped at any time:

        prompt      accepted    tree of the running pass
        |---------------------|- - - - - - - - - - - - -|
        `keep(count)` moves the mark to the right; `drop_rest` cuts there

    Args:
        cache: a `DynamicCache`, with which an answer begins.
        count: entries to keep; all that it holds if left out.
    """

    def __init__(self, cache: Any, count: int | None = None) -> None:
        self.cache = cache
        self._kept: tuple[int, list[tuple[Any, dict[str, Any] | None]]] = 0, []
        """(entries, [(layer, attributes that it had)]); None where the layer can be cut."""
        self.keep(int(cache.get_seq_length()) if count is None else count)

    def keep(self, count: int) -> None:
        """Keep the first `count` entries from now on; every layer has them. Mutates."""
        # A pass may set up an empty layer, or replace it, and a sliding window loses old entries to
        # new ones. Neither can be cut back, but both are what they were again with the attributes
        # that they had. Nothing is copied of them.
        layers: list[tuple[Any, dict[str, Any] | None]] = []
        for layer in self.cache.layers:
            layers.append((layer, None if count and can_be_cut(layer) else _attributes(layer)))
        # One assignment: an interrupt must change both or neither.
        self._kept = count, layers

    def drop_rest(self) -> None:
        """Drop all other entries. Mutates: the cache.

        Where this is interrupted, it must be called again.
        """
        count, layers = self._kept
        self.cache.layers[:] = [layer for layer, _ in layers]
        for layer, former in layers:
            if former is not None:
                vars(layer).update(former if _replaces(layer) else copy.deepcopy(former))
            elif layer.is_initialized and _length(layer) > count:
                cut_entries(layer, count)


def _replaces(layer: Any) -> bool:
    """Whether a pass gives a layer new tensors; else it may write into those that are there, as
    linear attention does with its states.
    """
    return can_be_cut(layer) or type(layer) in (DynamicSlidingWindowLayer, DynamicIndexedLayer)


def _attributes(layer: Any) -> dict[str, Any]:
    """A layer's attributes, which bring it back."""
    return dict(vars(layer)) if _replaces(layer) else copy.deepcopy(vars(layer))


def _length(layer: Any) -> int:
    """Entries of the longer of keys and values: an interrupt may have come between them."""
    return max(layer.keys.shape[2], layer.values.shape[2])
