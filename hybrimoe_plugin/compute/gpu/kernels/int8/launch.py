"""Launch the int8 decode kernels: activations to int8 at the start of a stage, then the stage."""

from __future__ import annotations

import torch
import triton

from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.epilogue import Epilogue
from hybrimoe_plugin.compute.gpu.kernels.formats.description import INTEGERS
from hybrimoe_plugin.compute.gpu.kernels.formats.tables import point_tables
from hybrimoe_plugin.compute.gpu.kernels.int8.decode import down_int8, gate_up_int8
from hybrimoe_plugin.compute.gpu.kernels.int8.states import padded, quantise, state_bytes
from hybrimoe_plugin.compute.gpu.kernels.layout import SlotLayout

_GROUPS = 4
"""Groups of 32 columns that one program brings to int8."""
_WARP = 32
_GATE_ROWS, _DOWN_ROWS = 4, 4
"""Rows in which a thread has a unit."""


class Int8Decode:
    """Both stages of a decode call.

    Args:
        asm: with the device's own instructions for packed integers; without them the same integers
            come from plain arithmetic, which Triton's interpreter can run.
    """

    def __init__(self, asm: bool) -> None:
        self.asm = asm

    @staticmethod
    def takes_gate_up(layout: SlotLayout) -> bool:
        return layout.gate.type_name in INTEGERS and layout.up.type_name in INTEGERS

    @staticmethod
    def takes_down(layout: SlotLayout) -> bool:
        return layout.down.type_name in INTEGERS

    @classmethod
    def takes(cls, layout: SlotLayout) -> bool:
        """Whether a stage of such experts is computed here."""
        return cls.takes_gate_up(layout) or cls.takes_down(layout)

    def blocks(self, layout: SlotLayout, top_k: int, others: Blocks) -> Blocks:
        """Tile sizes that follow from the shape; `others` for what is not computed here.

        One warp has no barriers, and each thread a unit in several rows, which share what is read
        of the activations.
        """
        if self.takes_gate_up(layout):
            units = _units_of_a_warp(-(-layout.gate.columns // 64))
            rows = max(1, _WARP * _GATE_ROWS // units)
            others = others._replace(gate_rows=rows, gate_units=units, decode_warps=1)
        if self.takes_down(layout):
            units = _units_of_a_warp(top_k * -(-layout.down.columns // 64))
            rows = max(1, _WARP * _DOWN_ROWS // units)
            others = others._replace(down_rows=rows, down_units=units, down_warps=1)
        return others

    def states(self, vectors: torch.Tensor) -> torch.Tensor:
        """[V, bytes] uint8 for the kernels (`int8.states`) from vectors [V, columns]."""
        vectors = vectors.contiguous()
        count, columns = vectors.shape
        found = torch.empty(count, state_bytes(columns), dtype=torch.uint8, device=vectors.device)
        grid = (count, triton.cdiv(padded(columns) // 32, _GROUPS))
        quantise[grid](vectors, found, columns, _GROUPS, num_warps=1)
        return found

    def gate_up(self, call: SlotCall, activations: torch.Tensor, blocks: Blocks) -> None:
        """Mutates: activations [T * K, I], of pairs with a slot."""
        layout = call.layout
        inner = layout.gate.rows
        grid = (triton.cdiv(inner, blocks.gate_rows), call.slot_ids.numel())
        gate_up_int8[grid](
            self.states(call.hidden),
            call.buffer,
            call.slot_ids.contiguous(),
            activations,
            point_tables((layout.gate.type_name, layout.up.type_name), call.buffer),
            call.buffer.stride(0),
            layout.up.offset,
            call.slot_ids.shape[1],
            layout.gate.type_name,
            layout.up.type_name,
            layout.gate.columns,
            inner,
            blocks.gate_rows,
            blocks.gate_units,
            *Epilogue.of(layout),
            self.asm,
            num_warps=blocks.decode_warps,
        )

    def down(
        self, call: SlotCall, activations: torch.Tensor, output: torch.Tensor, blocks: Blocks
    ) -> None:
        """Mutates: output [T, H]."""
        layout = call.layout
        tokens, width = output.shape
        grid = (triton.cdiv(width, blocks.down_rows), tokens)
        down_int8[grid](
            self.states(activations),
            call.buffer,
            call.slot_ids.contiguous(),
            call.topk_weights.contiguous(),
            output,
            point_tables((layout.down.type_name,), call.buffer),
            call.buffer.stride(0),
            layout.down.offset,
            call.slot_ids.shape[1],
            layout.down.type_name,
            width,
            layout.down.columns,
            blocks.down_rows,
            blocks.down_units,
            Epilogue.of(layout).bias_offset,
            self.asm,
            num_warps=blocks.down_warps,
        )


def _units_of_a_warp(units: int) -> int:
    """How many of a row's units a warp takes at a time; the others of its threads take more rows.

    The most that leave at most a tenth of the threads without a unit at a row's end; or else those
    that leave the fewest.
    """
    taken = {size: -(-units // size) * size for size in (32, 16, 8, 4, 2, 1) if size <= 8 * units}
    for size, count in taken.items():
        if 10 * count <= 11 * units:
            return size
    return min(taken, key=lambda size: (taken[size], -size))
