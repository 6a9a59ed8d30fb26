"""Tile sizes of the Triton kernels for one layer shape.

None of them changes results beyond rounding.
"""

from __future__ import annotations

from typing import NamedTuple

from hybrimoe_plugin.compute.gpu.kernels.layout import SlotLayout


class Blocks(NamedTuple):
    """Tile sizes: rows, units of 64 columns, and warps of one program."""

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
        """Sizes that follow from the shape.

        About 16 bytes of codes for each thread and matrix in gate and up, 32 in down. That keeps
        some 20 KB of reads in flight in each multiprocessor at the registers that the kernels need
        (compiled for sm_90: 56 to 126), which is its share of the memory bandwidth times the
        latency. `tuning` tries the neighbours on the device.
        """
        gate_units = min(32, _units(layout.gate.columns))
        gate_rows = max(1, 64 // gate_units)
        places = _power_of_two(top_k)
        down_units = min(_units(layout.down.columns), 128 // places)
        down_units = max(1, down_units)
        down_rows = max(1, 128 // (places * down_units))
        return cls(gate_rows, gate_units, down_rows, down_units)

    def tile_tokens(self, pairs: int, experts: int) -> int:
        """Tokens of a prefill tile: the power of two that holds an expert's average load.

        At least 16, for tensor cores.
        """
        average = -(-pairs // experts)
        return max(16, min(self.tokens, _power_of_two(average)))


def _units(columns: int) -> int:
    """Units of 64 columns, rounded up to a power of two."""
    return _power_of_two(-(-columns // 64))


def _power_of_two(value: int) -> int:
    """The smallest one that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()
