"""Cache layers that stay in place: no copy of the context for every token, fixed addresses for CUDA
graphs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from hybrimoe_plugin.errors import InputError

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the KV cache: the second name up to 5.17, the first in later releases."""

_SPARE = 256
"""Tokens of room that a new buffer has at least; it doubles when it is full."""


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer` with spare room behind keys and values, which are views of the
    filled part.

    Rows that were given out are not written again: after a `crop` the next token goes to new
    buffers. `cut` crops where nobody holds them. In CUDA graphs buffers belong to the graphs, and
    what is held of them changes.
    """

    is_initialized: bool
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._shown = 0
        """Tokens in the buffers of which keys and values were given out."""

    def __copy__(self) -> GrowingLayer:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__, _buffers=None)
        if (
            self.is_initialized
        ):  # the buffers are written to, by this sequence and in CUDA graphs by others
            made.keys, made.values = self.keys.clone(), self.values.clone()
        return made

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, T, D] and give all keys and values so far. Raises: InputError: of other
        B, heads or D.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        if held and not (_alike(self.keys, key_states) and _alike(self.values, value_states)):
            raise InputError(
                f"the KV cache holds keys {list(self.keys.shape)} and values "
                f"{list(self.values.shape)}, which keys "
                f"{list(key_states.shape)} and values {list(value_states.shape)} do not go on: it "
                f"is another batch's "
                "or another model's"
            )
        total = held + key_states.shape[-2]
        if not self._fits(held, total):
            self._grow(key_states, value_states, held, total)
        assert self._buffers is not None
        keys, values = self._buffers
        keys.narrow(2, held, total - held).copy_(key_states)
        if values.shape[3]:  # latent attention keeps one row per token, as its keys
            values.narrow(2, held, total - held).copy_(value_states)
        self._show(total)
        return self.keys, self.values

    def cut(self, total: int) -> None:
        """Keep the first tokens, and write the next ones over the others: nobody else may hold
        those.
        """
        self.keys, self.values = self.keys[:, :, :total], self.values[:, :, :total]
        self._shown = total

    def lies_in(self, buffers: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
        """Whether keys and values are still views of these buffers: beams and batches
        replace them.
        """
        if buffers is None or self._buffers is not buffers or not self.is_initialized:
            return False
        # Not `_base`, which inference mode does not keep. What replaces keys replaces values too.
        return bool(
            self.keys.data_ptr() == buffers[0].data_ptr()
            and self.keys.shape[0] == buffers[0].shape[0]
        )

    def touches(self, buffers: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
        """Whether anything is still in these buffers, also after a `move` or `leave` that was
        interrupted.
        """
        if buffers is None or not self.is_initialized:
            return False
        places = {buffer.data_ptr() for buffer in buffers if buffer.numel()}
        return (
            self._buffers is buffers
            or self.keys.data_ptr() in places
            or self.values.data_ptr() in places
        )

    def move(self, buffers: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Go on in these buffers [B, heads, room, D], which have room for what is held; nothing if
        it lies there.
        """
        if self.lies_in(buffers):
            return
        held = self.get_seq_length()
        for buffer, old in zip(buffers, (self.keys, self.values), strict=True):
            buffer.narrow(2, 0, held).copy_(old)
        self._buffers = buffers
        self._show(held)

    def leave(self) -> None:
        """Go on in buffers of its own."""
        held = self.get_seq_length()
        self._grow(self.keys, self.values, held, held)
        self._show(held)

    def advance(self) -> None:
        """One more token has been written into the buffers behind what is held."""
        self._show(self.get_seq_length() + 1)

    def _show(self, total: int) -> None:
        assert self._buffers is not None
        keys, values = self._buffers
        self._shown = total
        self.keys, self.values = keys.narrow(2, 0, total), values.narrow(2, 0, total)

    def _fits(self, held: int, total: int) -> bool:
        buffers = self._buffers
        if buffers is None or not self.lies_in(buffers):
            return False
        return 0 < held == self._shown and total <= buffers[0].shape[2]

    def _grow(
        self, key_states: torch.Tensor, value_states: torch.Tensor, held: int, total: int
    ) -> None:
        room = max(2 * held, total + _SPARE)
        buffers = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            buffer = make_buffer(new, room)
            if held:
                buffer.narrow(2, 0, held).copy_(old)
            buffers.append(buffer)
        self._buffers = buffers[0], buffers[1]

    def reset(self) -> None:
        """Empty, as before the first update: not every release of transformers gives the length up
        itself.
        """
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized, self._buffers = False, None
        super().reset()


class FixedCache:
    """What attention sees of a growing layer in a CUDA graph: whole buffers, and the token's place
    in a tensor.

    Attributes:
        buffers: keys and values [1, heads, S, D].
        place: [1] int64 on their device; where the one token of a call is written.
        kernel: attention of one token over the buffers, (queries, *buffers that are not empty) ->
            output; None for torch's.
    """

    def __init__(
        self,
        buffers: tuple[torch.Tensor, torch.Tensor],
        place: torch.Tensor,
        kernel: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.buffers = buffers
        self.place = place
        self.kernel = kernel

    @property
    def seen(self) -> torch.Tensor:
        """[1, 1, 1, S] bool: the rows up to the token's own, attention's mask."""
        rows = torch.arange(self.buffers[0].shape[2], device=self.place.device)
        return (rows <= self.place)[None, None, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [1, heads, 1, D] and give the whole buffers. Mutates: the buffers."""
        keys, values = self.buffers
        keys.index_copy_(2, self.place, key_states)
        if values.shape[3]:
            values.index_copy_(2, self.place, value_states)
        return keys, values


def cache_name(module: Any) -> str:
    """The keyword under which this release of transformers hands a KV cache to a module's
    `forward`.
    """
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def cache_in(found: Any) -> Any:
    """The KV cache among a call's keyword arguments or in a model's output, under whichever name;
    None without one.
    """
    read = found.get if isinstance(found, Mapping) else lambda name: getattr(found, name, None)
    return next((cache for name in CACHE_NAMES if (cache := read(name)) is not None), None)


def make_buffer(like: torch.Tensor, room: int) -> torch.Tensor:
    """Zeros [B, heads, room, D] for a cache of states [B, heads, T, D]; rows that a mask hides must
    be finite.
    """
    with torch.inference_mode(False):  # such a buffer can be written in every mode
        return like.new_zeros((*like.shape[:2], room, like.shape[3]))


def _alike(held: torch.Tensor, new: torch.Tensor) -> bool:
    # Not by slices of shapes, which take thrice the time, in every layer of every token.
    ours, theirs = held.shape, new.shape
    return ours[0] == theirs[0] and ours[1] == theirs[1] and ours[3] == theirs[3]


def growing(cache: Any, layer: int) -> None:
    """Put a growing layer in the place of a cache's still empty dynamic one; other kinds are left
    alone.

    Mutates: `cache`.
    """
    if isinstance(cache, FixedCache):
        return
    layers = cache.layers
    if layer < len(layers):
        if type(layers[layer]) is DynamicLayer and not layers[layer].is_initialized:
            layers[layer] = GrowingLayer()
    elif layer == len(layers) and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        layers.append(GrowingLayer())
