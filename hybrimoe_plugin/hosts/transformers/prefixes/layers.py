"""Layers of KV caches that are put aside in main memory, copied, and taken up again.

Two forms of layers are known:

    cut       full attention: entries of every token, so that those behind any can be dropped
    whole     sliding windows, linear and indexed attention: good for going on behind all that was
              computed
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from hybrimoe_plugin.compute.attention.kept_entries import can_be_cut, cut_entries

WHOLE = (DynamicSlidingWindowLayer, DynamicIndexedLayer, LinearAttentionLayer)
"""Types of layers of the second form; exactly these, as a subclass may keep more."""

_MOST_WASTE = 1.5
"""Memory that a kept tensor may hold, by what its entries take; else it is copied."""

HOST = torch.device("cpu")
"""Where entries are kept."""


def held_by(layers: Sequence[Any]) -> int:
    """Tokens whose entries all layers hold; 0 where nobody can go on behind them.

    Layers that can be cut may differ, as after an interrupted pass; others may not.
    """
    if not layers or not all(map(_is_of_one_sequence, layers)):
        return 0
    lengths = [length for length in map(_length, layers) if length is not None]
    if not lengths:
        return 0  # nothing says how many tokens a recurrent state has seen
    if len(set(lengths)) > 1 and not all(map(can_be_cut, layers)):
        return 0
    return min(lengths)


def device_of(layer: Any) -> torch.device:
    """Where a filled layer lies."""
    return next(_tensors(layer)).device


def bytes_of(layers: Sequence[Any]) -> int:
    """Memory that the layers keep from being freed, spare capacity included."""
    storages = [tensor.untyped_storage() for layer in layers for tensor in _tensors(layer)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def put_aside(layer: Any, count: int) -> Any:
    """A layer's first entries in main memory, with little spare capacity.

    Args:
        layer: is not used any more by anybody else. Mutates.
        count: tokens to keep: all that were seen, where the layer cannot be cut.
    """
    if not can_be_cut(layer):
        return _changed(layer, _trimmed)
    cut_entries(layer, count)
    # A graph's buffers are taken by its next sequence, and this one would leave to larger ones.
    is_own = not getattr(layer, "is_lent", False)
    if is_own and _is_fitting(layer.keys) and _is_fitting(layer.values):
        return layer
    made = type(layer)()
    made.lazy_initialization(layer.keys, layer.values)
    made.keys, made.values = _copied(layer.keys), _copied(layer.values)
    return made


def trim(layer: Any) -> None:
    """Give back what a sliding window has left behind. Mutates.

    Its entries are a part of those that the last pass saw.
    """
    if type(layer) is DynamicSlidingWindowLayer and _is_wasteful(layer.keys):
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def copy_of(layer: Any, count: int, device: torch.device) -> Any:
    """A layer of its own memory with the first entries of another, on a device.

    Args:
        count: tokens to copy: all that were seen, where the layer cannot be cut.
    """
    if not can_be_cut(layer):
        return _changed(layer, lambda tensor: tensor.to(device, copy=True))
    keys = layer.keys[:, :, :count].to(device)
    values = layer.values[:, :, :count].to(device)
    made = type(layer)()
    made.update(keys, values)
    return made


def _is_of_one_sequence(layer: Any) -> bool:
    if not can_be_cut(layer) and type(layer) not in WHOLE:
        return False
    if getattr(layer, "record_past", False):
        return False  # holds entries that a call is to drop yet
    return next(_tensors(layer), None) is not None and all(
        tensor.shape[0] == 1 for tensor in _tensors(layer)
    )


def _length(layer: Any) -> int | None:
    """Tokens that a layer has seen; None where it does not know."""
    if type(layer) is DynamicSlidingWindowLayer:
        return int(layer.cumulative_length)
    if can_be_cut(layer) or type(layer) is DynamicIndexedLayer:
        return int(min(layer.keys.shape[2], layer.values.shape[2]))
    return None


def _tensors(layer: Any) -> Iterator[torch.Tensor]:
    """What a layer holds of the sequence."""
    if hasattr(layer, "keys"):
        states = (layer.keys, layer.values, getattr(layer, "indexer_keys", None))
    else:
        states = (*layer.conv_states.values(), *layer.recurrent_states.values())
    return (state for state in states if state is not None)


def _changed(layer: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a layer with all its tensors changed."""

    def one(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one(item) for key, item in value.items()}
        return change(value) if isinstance(value, torch.Tensor) else value

    made = copy.copy(layer)
    vars(made).update({name: one(value) for name, value in vars(layer).items()})
    return made


def _trimmed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if _is_fitting(tensor) else _copied(tensor)


def _is_fitting(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in main memory and keeps little more of it than it needs."""
    return tensor.device == HOST and not _is_wasteful(tensor)


def _is_wasteful(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > _MOST_WASTE * tensor.nbytes


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(HOST, copy=True, memory_format=torch.contiguous_format)
