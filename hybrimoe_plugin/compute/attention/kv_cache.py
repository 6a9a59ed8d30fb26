"""KV cache layers that append in place, and their view at fixed addresses in a CUDA graph.

A growing layer has spare capacity behind the tokens that it holds, so that a new token is one
write and not a copy of the whole context:

    buffer [B, heads, capacity, D]   | t0 | t1 | t2 | t3 |    |    |    |    |
                                     |<-- keys, values ->|<-- spare capacity ->|

`keys` and `values` are views of the filled part. A CUDA graph instead takes the whole buffer,
through `FixedCache`: its addresses and shapes do not change from step to step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from hybrimoe_plugin.errors import InputError

Buffers = tuple[torch.Tensor, torch.Tensor]
"""Memory for keys and values, each [B, heads, capacity, D]."""

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the KV cache: the second name up to 5.17, the first in later releases."""

_MIN_SPARE = 256
"""Tokens of spare capacity that a new buffer has at least; a full buffer's capacity is doubled."""


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer` with spare capacity: keys and values are views of buffers.

    Entries that were returned are not overwritten: after a `crop` the next token goes to new
    buffers. `cut` is a crop for callers who know that nobody holds those entries. Layers that are
    replayed as CUDA graphs own the buffers; the sequence in them may change.

    A replay reads no view of the buffers, so views are made when somebody asks for them.
    """

    is_initialized: bool

    def __init__(self) -> None:
        self._buffers: Buffers | None = None
        self._shown = 0
        """Tokens in the buffers of which keys and values were returned."""
        self._held: int | None = None
        """Tokens at the beginning of the buffers that are keys and values.

        None where `_keys` and `_values` say what these are: others have put them there.
        """
        self._keys: torch.Tensor
        self._values: torch.Tensor
        self._viewed: tuple[Buffers, int] | None = None
        """Of which buffers, and of how many tokens, `_keys` and `_values` are views."""
        self.is_lent = False
        """Whether the buffers are others', who may let this sequence `leave` at any time."""
        super().__init__()

    @property
    def keys(self) -> torch.Tensor:
        """[B, heads, T, D]; None before the first update."""
        self._make_views()
        return self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor) -> None:
        self._leave_views()
        self._keys = keys

    @property
    def values(self) -> torch.Tensor:
        """[B, heads, T, D]; None before the first update."""
        self._make_views()
        return self._values

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        self._leave_views()
        self._values = values

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Tokens held."""
        held = self._held
        if held is None:
            held = super().get_seq_length(*args, **kwargs)
        return held

    def __copy__(self) -> GrowingLayer:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__, _buffers=None, _held=None, _viewed=None, is_lent=False)
        if self.is_initialized:
            # The buffers are written to: by this sequence, and in CUDA graphs by others.
            made.keys = self.keys.clone()
            made.values = self.values.clone()
        return made

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, T, D] and return all keys and values so far.

        Raises:
            InputError: B, heads or D differ from those of what is held.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        if held:
            self._check_alike(key_states, value_states)
        total = held + key_states.shape[-2]
        if not self._fits(held, total):
            self._grow(key_states, value_states, held, total)
        assert self._buffers is not None
        keys, values = self._buffers
        keys.narrow(2, held, total - held).copy_(key_states)
        if values.shape[3]:  # latent attention keeps one vector for each token, as its key
            values.narrow(2, held, total - held).copy_(value_states)
        self._show(total)
        self._make_views()
        return self._keys, self._values

    def cut(self, total: int) -> None:
        """Keep the first tokens; the next ones overwrite the others, which nobody may hold."""
        if self._held is None:
            self.keys = self.keys[:, :, :total]
            self.values = self.values[:, :, :total]
        else:
            self._held = min(self._held, total)
        self._shown = total

    def lies_in(self, buffers: Buffers | None) -> bool:
        """Whether keys and values are still views of these buffers.

        Beam search and batch selection replace them by other tensors.
        """
        if buffers is None or self._buffers is not buffers or not self.is_initialized:
            return False
        if self._held is not None:
            return True
        # Not `_base`, which inference mode does not keep. What replaces keys replaces values too.
        same_address: bool = self.keys.data_ptr() == buffers[0].data_ptr()
        same_batch = self.keys.shape[0] == buffers[0].shape[0]
        return same_address and same_batch

    def touches(self, buffers: Buffers | None) -> bool:
        """Whether anything is in these buffers, after an interrupted `move` or `leave` too."""
        if buffers is None or not self.is_initialized:
            return False
        if self._buffers is buffers:
            return True
        addresses = {buffer.data_ptr() for buffer in buffers if buffer.numel()}
        return self.keys.data_ptr() in addresses or self.values.data_ptr() in addresses

    def move(self, buffers: Buffers) -> None:
        """Continue in these buffers, whose capacity suffices for what is held.

        Does nothing if the layer lies there already.
        """
        if self.lies_in(buffers):
            return
        held = self.get_seq_length()
        for buffer, old in zip(buffers, (self.keys, self.values), strict=True):
            buffer.narrow(2, 0, held).copy_(old)
        self.is_lent = True
        self._buffers = buffers
        self._show(held)

    def leave(self) -> None:
        """Continue in new buffers that no other sequence uses."""
        held = self.get_seq_length()
        self._grow(self.keys, self.values, held, held)
        self._show(held)

    def reserve(self) -> Buffers:
        """The buffers of what is held, with room for one more token behind it.

        The layer must have been given something. Mutates: the buffers, if they were full.
        """
        held = self.get_seq_length()
        if not self._fits(held, held + 1):
            self._grow(self.keys, self.values, held, held + 1)
            self._show(held)
        assert self._buffers is not None
        return self._buffers

    def advance(self) -> None:
        """Count one more token, which was written into the buffers behind what is held."""
        self._show(self.get_seq_length() + 1)

    def reset(self) -> None:
        """Empty the layer, as before the first update.

        Not every release of transformers resets the length by itself.
        """
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        self._buffers = None
        super().reset()

    def _show(self, total: int) -> None:
        self._shown = total
        self._held = total
        viewed = self._viewed
        if viewed is None or viewed[0] is not self._buffers:
            self._make_views()  # at once: the old ones keep other memory alive

    def _make_views(self) -> None:
        """Make `_keys` and `_values` what they are to be."""
        buffers, held, viewed = self._buffers, self._held, self._viewed
        if held is None or buffers is None:
            return
        if viewed is not None and viewed[0] is buffers and viewed[1] == held:
            return
        self._viewed = None  # an interrupt between the two leaves one of each
        keys, values = buffers
        self._keys = keys.narrow(2, 0, held)
        self._values = values.narrow(2, 0, held)
        self._viewed = buffers, held

    def _leave_views(self) -> None:
        """From now on `_keys` and `_values` say what is held."""
        self._make_views()
        self._held = self._viewed = None

    def _fits(self, held: int, total: int) -> bool:
        buffers = self._buffers
        if buffers is None or not self.lies_in(buffers):
            return False
        return 0 < held == self._shown and total <= buffers[0].shape[2]

    def _grow(
        self, key_states: torch.Tensor, value_states: torch.Tensor, held: int, total: int
    ) -> None:
        capacity = max(2 * held, total + _MIN_SPARE)
        keys = make_buffer(key_states, capacity)
        values = make_buffer(value_states, capacity)
        if held:
            keys.narrow(2, 0, held).copy_(self.keys)
            values.narrow(2, 0, held).copy_(self.values)
        self._buffers = keys, values
        self.is_lent = False

    def _check_alike(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # The buffers where they hold everything: a view would be made for the shape alone.
        held = self._buffers if self._held is not None else None
        keys, values = held or (self.keys, self.values)
        if _alike(keys, key_states) and _alike(values, value_states):
            return
        raise InputError(
            f"the KV cache holds keys {list(self.keys.shape)} and values "
            f"{list(self.values.shape)}, which keys "
            f"{list(key_states.shape)} and values {list(value_states.shape)} do not go on: it "
            f"is another batch's "
            "or another model's"
        )


class FixedCache:
    """What attention sees of a growing layer in a CUDA graph: whole buffers and a position.

    Attributes:
        buffers: keys and values [B, heads, capacity, D].
        position: [1] int64 on their device: the entry that the one token that a call has of each
            sequence is written to.
        kernel: attention of one token over the buffers, (queries, *buffers that are not empty) ->
            output. It knows which entries the token sees.
    """

    def __init__(
        self,
        buffers: Buffers,
        position: torch.Tensor,
        kernel: Callable[..., torch.Tensor],
    ) -> None:
        self.buffers = buffers
        self.position = position
        self.kernel = kernel

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, heads, 1, D] and return the whole buffers. Mutates: the buffers."""
        keys, values = self.buffers
        keys.index_copy_(2, self.position, key_states)
        if values.shape[3]:
            values.index_copy_(2, self.position, value_states)
        return keys, values


def cache_name(module: Any) -> str:
    """The keyword under which this release of transformers passes a KV cache to a module."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def cache_in(found: Any) -> Any:
    """The KV cache in a call's keyword arguments or in a model's output; None without one."""
    is_mapping = type(found) is dict or isinstance(found, Mapping)
    for name in CACHE_NAMES:
        cache = found.get(name) if is_mapping else getattr(found, name, None)
        if cache is not None:
            return cache
    return None


def make_buffer(like: torch.Tensor, capacity: int) -> torch.Tensor:
    """Zeros [B, heads, capacity, D] for a cache of states [B, heads, T, D].

    Zeros, since entries that a mask hides must be finite.
    """
    with torch.inference_mode(False):  # such a buffer can be written in every mode
        return like.new_zeros((*like.shape[:2], capacity, like.shape[3]))


def use_growing_layer(cache: Any, layer: int) -> None:
    """Replace a cache's still empty dynamic layer by a growing one; other kinds are left alone.

    Mutates: `cache`.
    """
    if isinstance(cache, FixedCache):
        return
    layers = cache.layers
    if layer < len(layers):
        if type(layers[layer]) is DynamicLayer and not layers[layer].is_initialized:
            layers[layer] = GrowingLayer()
        return
    makes_dynamic = getattr(cache, "layer_class_to_replicate", None) is DynamicLayer
    if layer == len(layers) and makes_dynamic:
        layers.append(GrowingLayer())


def _alike(held: torch.Tensor, new: torch.Tensor) -> bool:
    # Not by slices of shapes, which take thrice the time, in every layer of every token.
    ours = held.shape
    theirs = new.shape
    return ours[0] == theirs[0] and ours[1] == theirs[1] and ours[3] == theirs[3]
