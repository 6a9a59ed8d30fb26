"""One token's rotary embedding, and the cache that its attention reads."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.compute.cpu.ggml.tensor import buffer
from hybrimoe_plugin.compute.cpu.native.structures import Attention

_LEAST_BLOCK, _MOST_BLOCK, _BLOCK_BYTES = 16, 256, 64 << 10
"""Tokens of the cache of a chunk, whose keys are to stay in a core's cache."""


class Rotating(NamedTuple):
    """A rotary embedding: result[i] = x[first[i]] * by_first[i] + x[second[i]] * by_second[i]."""

    first: torch.Tensor
    """[D] int64, as `second`."""
    second: torch.Tensor
    by_first: torch.Tensor
    """[D] float32, as `by_second`; of the running step's position."""
    by_second: torch.Tensor


class AttendedCache:
    """The cache that a graph's attention reads, and writes the new entry to."""

    def __init__(self, data: Attention, step: int) -> None:
        self._data = data
        self.step = step
        self.operation: Any = None
        """The one whose chunks are blocks of tokens; known once the graph is finished."""
        width = max(data.width, data.value_width)
        block = _BLOCK_BYTES // (4 * width)
        self._block = data.block = max(_LEAST_BLOCK, min(block, _MOST_BLOCK))
        self._blocks = 0
        self._parts: torch.Tensor | None = None
        self._keys: Callable[[], torch.Tensor | None] = lambda: None
        """The buffers that were named last, as long as they live: they may be gigabytes."""

    def fits(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether the graph may read and write a cache's buffers [B, key heads, capacity, D]."""
        if keys is self._keys():
            return True
        data = self._data
        heads = keys.shape[1] == values.shape[1] == data.key_heads
        value_width = data.value_width if data.value else 0
        widths = (keys.shape[3], values.shape[3]) == (data.width, value_width)
        return heads and widths and _suits(keys) and _suits(values)

    def set(self, keys: torch.Tensor, values: torch.Tensor, held: int) -> None:
        """Name it for the next runs.

        Args:
            keys: [1, key heads, capacity, D] float32, of which so many are held; there is room for
                one more.
            values: the same with W; with no values where those of keys are read.
        """
        data = self._data
        if keys is not self._keys():
            self._keys = lambda: None
            values = values if values.shape[3] else keys
            data.keys, data.values = keys.data_ptr(), values.data_ptr()
            data.key_head_stride, data.key_stride = keys.stride(1), keys.stride(2)
            data.value_head_stride, data.value_stride = values.stride(1), values.stride(2)
            self._keys = weakref.ref(keys)
        blocks = held // self._block + 1
        if blocks > self._blocks:
            heads = data.key_heads * data.group
            self._blocks = 0  # an interrupt must not leave the address of what is freed
            self._parts = buffer(2 * blocks, heads, data.value_width + 2)
            data.parts = self._parts.data_ptr()
            self._blocks = 2 * blocks
        data.held = held
        self.operation.chunks = blocks * data.key_heads


def _suits(part: torch.Tensor) -> bool:
    dense = part.stride(3) == 1 or part.shape[3] < 2
    return dense and part.dtype == torch.float32 and len(part) == 1 and part.device.type == "cpu"
