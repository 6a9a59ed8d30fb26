"""Decode attention by our own kernels, which split the keys over the device (`split_keys`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from hybrimoe_plugin.compute.attention.decode_attention import AttentionShape, Widths
from hybrimoe_plugin.compute.attention.split_keys import attend_ranges, combine_ranges
from hybrimoe_plugin.compute.gpu.kernels.linear import dot_type

PROGRAMS = 2
"""Wanted for each multiprocessor, so that one loads while another computes."""
MOST_RANGES = 128
"""A constant of the kernels, which are compiled once for caches of all sizes."""
COLUMNS = 64
"""Of the output, in one program that combines ranges."""
SHORTEST_DOT = 16
"""Rows and columns that a matrix product has at least."""


class Tiles(NamedTuple):
    """What one program holds; compiled without spills for every width (tests/compute)."""

    heads: int
    """Query heads."""
    tokens: int
    """Entries of the cache, of one step of its loop."""

    @classmethod
    def of(cls, widths: Widths, dtype: torch.dtype) -> Tiles:
        bytes_of_row = _block(max(widths.main, widths.values)) * dtype.itemsize
        return cls(heads=SHORTEST_DOT, tokens=64 if bytes_of_row <= 256 else 32)


class SplitAttention:
    """Attention of one token over a fixed-address cache; all sizes of the step are on the device.

    Its calls share memory for what the ranges give: they must run one after another.

    Args:
        position: [1] int64 on the device: the entry of the token, read by every call.
        ranges: into how many the keys are cut; by default as many as fill the device.
    """

    name = "attention with split keys"

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        position: torch.Tensor,
        ranges: int | None = None,
    ) -> None:
        self.shape = shape
        self._position = position
        self._widths = widths = shape.widths
        self._tiles = Tiles.of(widths, shape.dtype)
        self._group = shape.heads // shape.groups
        self._programs = shape.groups * triton.cdiv(self._group, self._tiles.heads)
        self._ranges = ranges or self._ranges_for(shape.capacity, device)
        with torch.inference_mode(False):
            size = shape.heads, self._ranges
            self._sums = torch.zeros(*size, widths.output, device=device)
            self._maxima = torch.zeros(*size, device=device)
            self._totals = torch.zeros(*size, device=device)

    def _ranges_for(self, capacity: int, device: torch.device) -> int:
        processors = 1
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = triton.cdiv(PROGRAMS * processors, self._programs)
        tiles = triton.cdiv(capacity, self._tiles.tokens)
        return min(MOST_RANGES, wanted, tiles)

    def plan(self, held: int) -> None:
        """Nothing to do: the position is read on the device."""

    def __call__(self, query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        """[1, heads, 1, width of values] from queries [1, heads, 1, width] and cache buffers."""
        query = query[0, :, 0]
        if query.stride(1) != 1:
            query = query.contiguous()
        keys = cache[0][0]
        values = cache[-1][0]
        widths = self._widths
        shape = self.shape
        ranges = self._ranges
        tokens = self._tiles.tokens
        attend_ranges[(self._programs, ranges)](
            query,
            keys,
            values,
            self._position,
            self._sums,
            self._maxima,
            self._totals,
            query.stride(0),
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            shape.scaling * math.log2(math.e),
            ranges,
            self._group,
            self._tiles.heads,
            tokens,
            widths.main,
            _block(widths.main),
            widths.rest,
            _block(widths.rest),
            widths.values,
            _block(widths.output),
            dot_type(query.dtype, interpreted=query.device.type == "cpu"),
            num_warps=4,
            num_stages=2,
        )
        output = query.new_empty(1, shape.heads, 1, widths.output)
        combine_ranges[(shape.heads, triton.cdiv(widths.output, COLUMNS))](
            self._position,
            self._sums,
            self._maxima,
            self._totals,
            output,
            ranges,
            MOST_RANGES,
            tokens,
            widths.output,
            COLUMNS,
        )
        return output


def _block(width: int) -> int:
    """The width of a tile for so many columns."""
    return max(SHORTEST_DOT, triton.next_power_of_2(width))
