"""KV caches whose entries are their tokens, without a model's passes."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from transformers.cache_utils import DynamicLayer

from hybrimoe_plugin.compute.attention.kept_entries import can_be_cut
from hybrimoe_plugin.compute.attention.kv_cache import GrowingLayer
from hybrimoe_plugin.hosts.transformers.prefixes.store import PrefixStore

WIDTH = 8
BYTES = 2 * 2 * WIDTH * 4
"""Of one token: in two layers, key and value of floats."""


class Model:
    """Has a config, and nothing else.

    Args:
        window: of the second layer's attention; None where it sees every token.
    """

    def __init__(self, window: int | None = None) -> None:
        self.config = tiny.config("mixtral")
        self.config.layer_types = ["full_attention", "full_attention"]
        if window is not None:
            self.config.sliding_window = window
            self.config.layer_types[1] = "sliding_attention"


def extend(cache: Any, tokens: list[int], piece: int = 10_000) -> Any:
    """Write the entries of tokens behind those that a cache holds; gives the cache."""
    layers = cache.layers
    # As operators do it, which write the entries of models that were injected.
    if type(layers[0]) is DynamicLayer and not layers[0].is_initialized:
        layers[0] = GrowingLayer()
    for at in range(0, len(tokens), piece):
        states = torch.tensor(tokens[at : at + piece], dtype=torch.float32)
        states = states.view(1, 1, -1, 1).expand(1, 1, -1, WIDTH)
        for layer in layers:
            layer.update(states, states + 0.5)
    return cache


def check(layers: list[Any], tokens: list[int]) -> None:
    """Each layer holds the entries of these tokens: its last ones, if it has a window."""
    for layer in layers:
        assert layer.get_seq_length() == len(tokens)
        if not tokens:
            continue
        last = len(tokens) if can_be_cut(layer) else min(len(tokens), layer.sliding_window - 1)
        assert layer.keys[0, 0, :, 0].tolist() == tokens[-last:]
        assert layer.values[0, 0, :, -1].tolist() == [token + 0.5 for token in tokens[-last:]]


def check_entries(store: PrefixStore) -> None:
    """All that is kept is right, and within the limit."""
    for entry in store._entries:
        check(entry.layers, entry.ids.tolist())
    assert store.nbytes <= store.limit


def keep(store: PrefixStore, tokens: list[int], piece: int = 10_000) -> None:
    """Begin, write and end a sequence."""
    cache, shared = store.begin(tokens)
    check(cache.layers, tokens[:shared])
    store.end(tokens, extend(cache, tokens[shared:], piece))
