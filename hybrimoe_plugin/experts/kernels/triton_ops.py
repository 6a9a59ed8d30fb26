"""Launches the Triton kernels: one launch for each stage, whatever the number of experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.experts.kernels.base import SlotCall, slot_positions
from hybrimoe_plugin.experts.kernels.decode import down_decode, gate_up_decode
from hybrimoe_plugin.experts.kernels.formats import SUPPORTED
from hybrimoe_plugin.experts.kernels.layout import BLOCK_BYTES, PLANES, Part, SlotLayout, slot_layout
from hybrimoe_plugin.experts.kernels.prefill import down_prefill, gate_up_prefill
from hybrimoe_plugin.experts.kernels.repack import split_planes

_COLUMNS_MULTIPLE = {"Q4_K": 256, "Q5_K": 256, "Q6_K": 256}
"""Of a matrix's columns; 32 for every other type."""


class Blocks(NamedTuple):
    """Tile sizes of one layer shape; none of them changes results beyond rounding."""

    gate_rows: int
    gate_units: int
    """Columns over 64 that a decode program's tile spans."""
    down_rows: int
    down_units: int
    """The same, for each of a token's experts."""
    decode_warps: int = 4
    tokens: int = 32
    rows: int = 64
    prefill_warps: int = 4

    @classmethod
    def of(cls, layout: SlotLayout, top_k: int) -> Blocks:
        """About 16 bytes of codes for each thread and matrix in gate and up, 32 in down.

        That keeps some 20 KB of reads on their way in each multiprocessor at the registers the kernels need (compiled
        for sm_90: 56 to 126), which is what its share of the memory bandwidth times the latency asks for. Not yet
        tuned on a device.
        """
        units = min(32, triton.next_power_of_2(triton.cdiv(layout.gate.columns, 64)))
        places = triton.next_power_of_2(top_k)
        down_units = max(1, min(triton.next_power_of_2(triton.cdiv(layout.down.columns, 64)), 128 // places))
        return cls(max(1, 64 // units), units, max(1, 128 // (places * down_units)), down_units)


class _Tiles(NamedTuple):
    """Routed pairs sorted by slot and cut into tiles that each belong to one slot."""

    order: torch.Tensor
    """[T * K] pair numbers, sorted by slot."""
    slots: torch.Tensor
    """[tiles] slot, -1 for a tile without pairs."""
    firsts: torch.Tensor
    ends: torch.Tensor


class TritonKernels:
    """Fused grouped kernels.

    Args:
        device: a CUDA device, or the CPU under Triton's interpreter.
        blocks: tile sizes; by default they follow the layer's shape.
        decode_tokens: up to this many tokens take the decode kernels.
    """

    name = "triton"

    def __init__(self, device: torch.device, blocks: Blocks | None = None, decode_tokens: int = 8) -> None:
        self._blocks = blocks
        self.decode_tokens = decode_tokens
        self._interpreted = device.type == "cpu"

    def refusal(self, spec: ExpertSpec) -> str | None:
        shapes = ((spec.gate_type, spec.hidden), (spec.up_type, spec.hidden), (spec.down_type, spec.intermediate))
        for kind, columns in shapes:
            if kind not in SUPPORTED:
                return f"no Triton kernel for GGML type {kind}; there is for {', '.join(SUPPORTED)}"
            if columns % _COLUMNS_MULTIPLE.get(kind, 32):
                return f"{columns} columns are no whole number of {kind} blocks"
        return None

    def layout(self, spec: ExpertSpec) -> SlotLayout:
        return slot_layout(spec, split=True)

    def repack(self, part: Part, raw: torch.Tensor, target: torch.Tensor) -> None:
        size = BLOCK_BYTES[part.type_name]
        blocks, per_program = part.size // size, 32
        planes = PLANES[part.type_name]
        split_planes[(triton.cdiv(blocks, per_program),)](
            raw.view(torch.int16),
            target.view(torch.int16),
            blocks,
            size // 2,
            tuple(offset // 2 for offset, _ in planes),
            tuple(count // 2 for _, count in planes),
            per_program,
        )

    def gate_up(self, call: SlotCall) -> Any:
        if len(call.hidden) <= self.decode_tokens:
            return self._gate_up_decode(call)
        return self._gate_up_prefill(call)

    def down(self, call: SlotCall, activations: Any) -> torch.Tensor:
        if isinstance(activations, torch.Tensor):
            return self._down_decode(call, activations)
        return self._down_prefill(call, *activations)

    def _gate_up_decode(self, call: SlotCall) -> torch.Tensor:
        hidden, layout, blocks = call.hidden.contiguous(), call.layout, self._sizes(call)
        inner, pairs = layout.gate.rows, call.slot_ids.numel()
        activations = torch.empty(pairs, inner, dtype=torch.float32, device=hidden.device)
        gate_up_decode[(triton.cdiv(inner, blocks.gate_rows), pairs)](
            hidden,
            call.buffer,
            call.slot_ids.contiguous(),
            activations,
            call.buffer.stride(0),
            layout.up.offset,
            call.slot_ids.shape[1],
            layout.gate.type_name,
            layout.up.type_name,
            layout.gate.columns,
            inner,
            blocks.gate_rows,
            blocks.gate_units,
            num_warps=blocks.decode_warps,
        )
        return activations

    def _down_decode(self, call: SlotCall, activations: torch.Tensor) -> torch.Tensor:
        layout, blocks = call.layout, self._sizes(call)
        tokens, width = call.hidden.shape
        output = torch.empty_like(call.hidden, memory_format=torch.contiguous_format)
        down_decode[(triton.cdiv(width, blocks.down_rows), tokens)](
            activations,
            call.buffer,
            call.slot_ids.contiguous(),
            call.topk_weights.contiguous(),
            output,
            call.buffer.stride(0),
            layout.down.offset,
            call.slot_ids.shape[1],
            triton.next_power_of_2(call.slot_ids.shape[1]),
            layout.down.type_name,
            width,
            layout.down.columns,
            blocks.down_rows,
            blocks.down_units,
            num_warps=blocks.decode_warps,
        )
        return output

    def _gate_up_prefill(self, call: SlotCall) -> tuple[torch.Tensor, _Tiles]:
        hidden, layout, blocks = call.hidden.contiguous(), call.layout, self._sizes(call)
        tiles = self._tiles(call)
        inner = layout.gate.rows
        activations = torch.empty(call.slot_ids.numel(), inner, dtype=hidden.dtype, device=hidden.device)
        gate_up_prefill[(triton.cdiv(inner, blocks.rows), len(tiles.slots))](
            hidden,
            call.buffer,
            *tiles,
            activations,
            call.buffer.stride(0),
            layout.up.offset,
            call.slot_ids.shape[1],
            layout.gate.type_name,
            layout.up.type_name,
            layout.gate.columns,
            inner,
            blocks.tokens,
            blocks.rows,
            self._dot(hidden.dtype),
            num_warps=blocks.prefill_warps,
        )
        return activations, tiles

    def _down_prefill(self, call: SlotCall, activations: torch.Tensor, tiles: _Tiles) -> torch.Tensor:
        layout, blocks = call.layout, self._sizes(call)
        tokens, width = call.hidden.shape
        # Pairs without a slot keep their zeros.
        parts = torch.zeros(call.slot_ids.numel(), width, dtype=call.hidden.dtype, device=call.hidden.device)
        down_prefill[(triton.cdiv(width, blocks.rows), len(tiles.slots))](
            activations,
            call.buffer,
            *tiles,
            call.topk_weights.contiguous(),
            parts,
            call.buffer.stride(0),
            layout.down.offset,
            layout.down.type_name,
            width,
            layout.down.columns,
            blocks.tokens,
            blocks.rows,
            self._dot(call.hidden.dtype),
            num_warps=blocks.prefill_warps,
        )
        return parts.view(tokens, -1, width).sum(dim=1)

    def _tiles(self, call: SlotCall) -> _Tiles:
        """Sort and cut on the device, by its own operations only: nothing is read back."""
        size, count, pairs = self._sizes(call).tokens, len(call.slots), call.slot_ids.numel()
        device = call.hidden.device
        places, slots = self._slot_places(call)
        keys = places[call.slot_ids.flatten()]  # -1, without a slot, reads the last entry: `count`
        sorted_keys, order = keys.sort(stable=True)
        bounds = torch.searchsorted(sorted_keys, torch.arange(count + 1, device=device))
        begin, end = bounds[:-1], bounds[1:]
        last_tiles = ((end - begin + size - 1) // size).cumsum(0)
        number = triton.cdiv(pairs, size) + count  # never fewer than needed: one part-filled tile for each slot
        tile = torch.arange(number, device=device)
        owner = torch.searchsorted(last_tiles, tile, right=True).clamp_(max=count - 1)
        within = tile - torch.where(owner > 0, last_tiles[owner - 1], 0)
        firsts = begin[owner] + within * size
        ends = torch.minimum(firsts + size, end[owner])
        used = tile < last_tiles[-1]
        return _Tiles(order, torch.where(used, slots[owner], -1), firsts, ends)

    def _slot_places(self, call: SlotCall) -> tuple[torch.Tensor, torch.Tensor]:
        """(slot -> place in `call.slots`, with `len(call.slots)` for all others and for -1; the slots)."""
        device = call.hidden.device
        places = torch.tensor([*slot_positions(call.slots, len(call.buffer)), len(call.slots)])
        slots = torch.tensor(call.slots)
        if device.type == "cuda":
            places, slots = places.pin_memory(), slots.pin_memory()
        return places.to(device, non_blocking=True), slots.to(device, non_blocking=True)

    def _sizes(self, call: SlotCall) -> Blocks:
        return self._blocks or Blocks.of(call.layout, call.slot_ids.shape[1])

    def _dot(self, dtype: torch.dtype) -> Any:
        """The type of `tl.dot`'s operands: hidden's own; float32 in the interpreter, which has no bfloat16 product."""
        if self._interpreted:
            return tl.float32
        return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)
