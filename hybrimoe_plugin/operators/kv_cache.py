"""A cache layer that grows in place: no copy of the whole context for every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

_SPARE = 256
"""Tokens of room that a new buffer has at least; it doubles when it is full."""


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer` with spare room behind keys and values, which are views of the filled part."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, T, D] and give all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if not self._fits(held, total):
            self._grow(key_states, value_states, held, total)
        assert self._buffers is not None
        keys, values = self._buffers
        keys.narrow(2, held, total - held).copy_(key_states)
        if values.shape[3]:  # latent attention keeps one row per token, as its keys
            values.narrow(2, held, total - held).copy_(value_states)
        self.keys, self.values = keys.narrow(2, 0, total), values.narrow(2, 0, total)
        return self.keys, self.values

    def _fits(self, held: int, total: int) -> bool:
        """Whether keys and values are still views of buffers with room: beams and batches replace them."""
        if self._buffers is None or total > self._buffers[0].shape[2] or held == 0:
            return False
        return self.keys._base is self._buffers[0] and self.values._base is self._buffers[1]

    def _grow(self, key_states: torch.Tensor, value_states: torch.Tensor, held: int, total: int) -> None:
        room = max(2 * held, total + _SPARE)
        buffers = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            buffer = new.new_empty((*new.shape[:2], room, new.shape[3]))
            if held:
                buffer.narrow(2, 0, held).copy_(old)
            buffers.append(buffer)
        self._buffers = buffers[0], buffers[1]

    def reset(self) -> None:
        super().reset()
        self._buffers = None


def growing(cache: Any, layer: int) -> None:
    """Put a growing layer in the place of a cache's still empty dynamic one; other kinds are left alone.

    Mutates: `cache`.
    """
    layers = cache.layers
    if layer < len(layers):
        if type(layers[layer]) is DynamicLayer and not layers[layer].is_initialized:
            layers[layer] = GrowingLayer()
    elif layer == len(layers) and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        layers.append(GrowingLayer())
