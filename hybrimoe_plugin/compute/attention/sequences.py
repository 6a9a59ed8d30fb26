"""Tokens of several sequences in one pass, over a KV cache of each sequence's own.

A batch in transformers is one cache, in which shorter sequences are padded. Here every sequence
keeps the cache that it has when it is computed alone, and can join and leave between two passes:

    pass        | new token of A | new token of B | new token of C |     [3, 1, H]
    attention   over A's entries | over B's       | over C's
    the rest    one call of three tokens

Attention operators of this project go row by row over `RowsLayer.append`, or over all rows at once
where they lie on a `Shelf`. The model's own attention modules get the same entries side by side,
padded on the left, from `RowsLayer.update`: a copy in every pass, right for any kind of attention
that takes transformers' masks.

Where all attention is by those operators, sequences may have several tokens each, such as a piece
of a prompt. They lie one after the other then, as if they were one sequence's:

    pass        | piece of D's prompt | A | B | E's prompt |     [1, T, H]
    attention   over D's entries, A's, B's, E's
    the rest    one call of T tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from hybrimoe_plugin.compute.attention.kv_cache import (
    Buffers,
    GrowingLayer,
    use_growing_layer,
)
from hybrimoe_plugin.compute.attention.shelf import Places, Shelf

_PLAIN = (DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer)
_LINEAR = getattr(cache_utils, "LinearAttentionLayer", None)
"""Not in every release of transformers that is allowed."""


class RowsLayer(DynamicLayer):
    """A layer's keys and values of several sequences.

    Args:
        layers: of the sequences, in the order of the pass.
        counts: as of `SequencesCache`.
    """

    def __init__(self, layers: Sequence[Any], counts: Sequence[int] | None) -> None:
        super().__init__()
        self.is_initialized = True
        self.layers = list(layers)
        self.counts = counts
        self.shelf: Buffers | None = None
        """Where the layers of all sequences lie side by side, if they do."""
        self.places: Places | None = None
        """Of the running pass, where there is a shelf."""
        self.is_sliding = bool(getattr(layers[0], "is_sliding", False))
        self._longest = max(self.layers, key=lambda layer: int(layer.get_seq_length()))

    def append(
        self, row: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, heads, T, D] to one sequence: all of its keys and values, as it is alone."""
        found: tuple[torch.Tensor, torch.Tensor] = self.layers[row].update(key, value)
        return found

    def append_all(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Append [R, heads, 1, D] on the shelf: all keys, all values, and a mask for scores."""
        assert self.shelf is not None and self.places is not None
        keys, values = self.places.append(self.shelf, key, value)
        for layer in self.layers:
            layer.advance()
        return keys, values, self.places.mask

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [R, heads, 1, D]: all keys and values [R, heads, longest, D], padded on the left.

        A mask must hide the padding, which is zeros.
        """
        found = [
            self.append(row, key_states[row : row + 1], value_states[row : row + 1])
            for row in range(len(self.layers))
        ]
        return _side_by_side([keys for keys, _ in found]), _side_by_side([v for _, v in found])

    def get_seq_length(self, *_args: Any, **_kwargs: Any) -> int:
        """Tokens of the longest sequence."""
        return int(self._longest.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As for a padded batch: of the longest sequence."""
        sizes: tuple[int, int] = self._longest.get_mask_sizes(query_length)
        return sizes


class SequencesCache(Cache):
    """What a pass over several sequences takes for its KV cache.

    Linear attention keeps a state of constant size instead of entries. The states of all sequences
    lie side by side in a layer of this cache as long as it is used: `settle` hands them back.

    Args:
        caches: of the sequences, each of one sequence. `can_share` says of which kinds. Mutates:
            them, in every pass.
        counts: tokens of each in the pass, one after the other; None for one token of each in a
            batch. With counts all layers can be cut, all attention is by this project's operators,
            and caches may have no entries yet.
        shelf: on which the sequences lie, in this order, if they do.
    """

    def __init__(
        self,
        caches: Sequence[Any],
        counts: Sequence[int] | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.caches = list(caches)
        self.shelf = shelf
        if counts is not None:
            for cache in caches:
                for number in range(len(cache.layers)):
                    use_growing_layer(cache, number)
        layers = zip(*(cache.layers for cache in caches), strict=True)
        super().__init__(layers=[_joined(each, counts) for each in layers])
        if shelf is not None:
            for layer, buffers in zip(self.layers, shelf.buffers, strict=True):
                layer.shelf = buffers

    def begin(self, lengths: Sequence[int], dtype: torch.dtype) -> None:
        """Before each pass of one token of each sequence.

        Args:
            lengths: tokens that each holds.
            dtype: of queries.
        """
        if self.shelf is not None:
            places = Places(lengths, dtype)
            for layer in self.layers:
                layer.places = places

    def settle(self) -> None:
        """Give every sequence its own states back; before its own cache is used again."""
        for number, layer in enumerate(self.layers):
            if _is_linear(layer):
                for row, cache in enumerate(self.caches):
                    _copy_state(layer, row, cache.layers[number])


def can_share(cache: Any) -> bool:
    """Whether a cache's layers are of kinds that `SequencesCache` knows."""
    # Exact types: what a subclass keeps besides keys and values is unknown here.
    return all(type(layer) in _PLAIN or _is_linear(layer) for layer in cache.layers)


def rows_of(cache: Any, layer: int) -> RowsLayer | None:
    """A layer's rows in a pass over several sequences; None in any other."""
    if type(cache) is not SequencesCache:
        return None
    found: RowsLayer = cache.layers[layer]
    return found


def attend_rows(
    rows: RowsLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attend: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """[R, heads, 1, D] from new queries, keys and values of R sequences; with counts, of R
    sequences one after the other, [1, heads, T, D].

    Args:
        attend: attention of one sequence's tokens over all its keys and values, (query, keys,
            values, mask) -> output; the mask is None for causal attention from the first token on.

    Mutates: the caches.
    """
    if rows.places is not None:
        return attend(query, *rows.append_all(key, value))
    sizes: Any = 1  # or a list
    axis = 0
    if rows.counts is not None:
        sizes, axis = rows.counts, 2
    found = []
    parts = zip(*(tensor.split(sizes, axis) for tensor in (query, key, value)), strict=True)
    for row, (one_query, one_key, one_value) in enumerate(parts):
        keys, values = rows.append(row, one_key, one_value)
        found.append(attend(one_query, keys, values, _mask(one_query, keys)))
    return torch.cat(found, axis)


def _mask(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
    """[T, S] for several tokens behind others, which see themselves and all before.

    torch's own causal mask takes them for the first ones.
    """
    count, everything = query.shape[2], keys.shape[2]
    if count in (1, everything):
        return None
    seen = torch.ones(count, everything, dtype=torch.bool, device=query.device)
    return seen.tril(everything - count)


def _side_by_side(rows: list[torch.Tensor]) -> torch.Tensor:
    longest = max(row.shape[2] for row in rows)
    return torch.cat([F.pad(row, (0, 0, longest - row.shape[2], 0)) for row in rows])


def _is_linear(layer: Any) -> bool:
    return _LINEAR is not None and type(layer) is _LINEAR


def _joined(layers: Sequence[Any], counts: Sequence[int] | None) -> Any:
    """One layer of a pass, from the layers of its sequences."""
    if not _is_linear(layers[0]):
        return RowsLayer(layers, counts)
    assert counts is None, "a state takes one token of each sequence"
    first = layers[0]
    made = type(first)(first.number_of_states)
    for name in ("is_conv_states_initialized", "is_recurrent_states_initialized"):
        setattr(made, name, dict(getattr(first, name)))
    made.has_previous_state = dict(first.has_previous_state)
    made.conv_kernel_size = dict(first.conv_kernel_size)
    made.device, made.dtype = first.device, first.dtype
    for name in ("conv_states", "recurrent_states"):
        for index, state in getattr(first, name).items():
            if state is not None:
                joined = torch.cat([getattr(layer, name)[index] for layer in layers])
                getattr(made, name)[index] = joined
    return made


def _copy_state(layer: Any, row: int, own: Any) -> None:
    for name in ("conv_states", "recurrent_states"):
        for index, state in getattr(layer, name).items():
            if state is not None:
                getattr(own, name)[index].copy_(state[row : row + 1])
