"""Which rows of a KV cache an answer keeps, whatever interrupts it."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.compute.attention.kv_cache import GrowingLayer


class KeptRows:
    """The first rows of a KV cache: those of accepted tokens. What lies behind them can be dropped
    at any time.

    Args:
        cache: a `DynamicCache`, with which an answer begins; what it holds is kept.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self._kept: tuple[int, list[tuple[Any, dict[str, Any] | None]]] = 0, []
        self.keep(int(cache.get_seq_length()))

    def keep(self, count: int) -> None:
        """Keep the first `count` rows from now on; every layer has them. Mutates."""
        # An empty layer may be set up by a pass, or replaced, and a window loses old rows to new
        # ones: neither can be cut back, but both are what they were again with the attributes that
        # they had. Nothing is copied.
        layers = [
            (layer, dict(vars(layer)) if not count or getattr(layer, "is_sliding", False) else None)
            for layer in self.cache.layers
        ]
        self._kept = count, layers  # both or neither

    def drop_rest(self) -> None:
        """Drop all other rows; to be called again where it was interrupted. Mutates: the cache."""
        count, layers = self._kept
        self.cache.layers[:] = [layer for layer, _ in layers]
        for layer, before in layers:
            if before is not None:
                vars(layer).update(before)
            elif layer.is_initialized and max(layer.keys.shape[2], layer.values.shape[2]) > count:
                _cut(layer, count)


def _cut(layer: Any, count: int) -> None:
    if isinstance(layer, GrowingLayer):
        layer.cut(
            count
        )  # the rows behind are the answer's own: the next ones may be written over them
    else:
        layer.keys, layer.values = layer.keys[:, :, :count], layer.values[:, :, :count]
