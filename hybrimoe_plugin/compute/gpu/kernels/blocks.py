"""Tile sizes of the Triton kernels for one layer shape; none of them changes results beyond
rounding.
"""

from __future__ import annotations

from typing import NamedTuple

from hybrimoe_plugin.compute.gpu.kernels.layout import SlotLayout


class Blocks(NamedTuple):
    """Rows and columns over 64 that one program's tile spans, and its warps."""

    gate_rows: int
    gate_units: int
    down_rows: int
    down_units: int
    """For each of a token's experts."""
    decode_warps: int = 4
    """Of gate and up."""
    down_warps: int = 4
    tokens: int = 64
    """Most tokens of a prefill tile; small loads take smaller ones."""
    rows: int = 64
    prefill_warps: int = 4

    @classmethod
    def of(cls, layout: SlotLayout, top_k: int) -> Blocks:
        """About 16 bytes of codes for each thread and matrix in gate and up, 32 in down.

        That keeps some 20 KB of reads on their way in each multiprocessor at the registers the
        kernels need (compiled for sm_90: 56 to 126), which is what its share of the memory
        bandwidth times the latency asks for. `tuning` tries the neighbours on the device.
        """
        units = min(32, _power_of_two(-(-layout.gate.columns // 64)))
        places = _power_of_two(top_k)
        down_units = max(1, min(_power_of_two(-(-layout.down.columns // 64)), 128 // places))
        return cls(max(1, 64 // units), units, max(1, 128 // (places * down_units)), down_units)

    def tile_tokens(self, pairs: int, experts: int) -> int:
        """Tokens of a prefill tile: the power of two that holds an expert's average load, 16
        (tensor cores) or more.
        """
        return max(16, min(self.tokens, _power_of_two(-(-pairs // experts))))


def _power_of_two(value: int) -> int:
    """The smallest one that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()
