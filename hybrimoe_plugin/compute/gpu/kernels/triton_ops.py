"""Launches the Triton kernels: one launch for each stage, whatever the number of experts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.base import SlotCall
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.decode import down_decode, gate_up_decode
from hybrimoe_plugin.compute.gpu.kernels.formats import SUPPORTED
from hybrimoe_plugin.compute.gpu.kernels.layout import (
    BLOCK_BYTES,
    PLANES,
    Part,
    SlotLayout,
    slot_layout,
)
from hybrimoe_plugin.compute.gpu.kernels.prefill import down_prefill, gate_up_prefill
from hybrimoe_plugin.compute.gpu.kernels.repack import split_planes
from hybrimoe_plugin.compute.gpu.kernels.tuning import Tuned, slot_groups, tune
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.device.cuda_timer import Timer

_COLUMNS_MULTIPLE = {"Q4_K": 256, "Q5_K": 256, "Q6_K": 256}
"""Of a matrix's columns; 32 for every other type."""


class _Tiles(NamedTuple):
    """Routed pairs sorted by slot and cut into tiles that each belong to one slot."""

    order: torch.Tensor
    """[T * K] pair numbers, sorted by slot."""
    slots: torch.Tensor
    """[tiles] slot, -1 for a tile without pairs."""
    firsts: torch.Tensor
    ends: torch.Tensor
    tokens: int
    """Most pairs of a tile."""


class TritonKernels:
    """Fused grouped kernels.

    Args:
        device: a CUDA device, or the CPU under Triton's interpreter.
        blocks: tile sizes; by default tuned ones, or those that follow from the layer's shape.
        decode_tokens: up to this many tokens take the decode kernels.
        tuned: where tuned sizes are kept; None in memory.
    """

    name = "triton"

    def __init__(
        self,
        device: torch.device,
        blocks: Blocks | None = None,
        decode_tokens: int = 8,
        tuned: Path | None = None,
    ) -> None:
        self._device = device
        self._blocks = blocks
        self._tuned = Tuned(tuned)
        self.decode_tokens = decode_tokens
        self._interpreted = device.type == "cpu"

    def refusal(self, spec: ExpertSpec) -> str | None:
        shapes = (
            (spec.gate_type, spec.hidden),
            (spec.up_type, spec.hidden),
            (spec.down_type, spec.intermediate),
        )
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

    def tune(self, layout: SlotLayout, top_k: int, buffer: torch.Tensor, timer: Timer) -> None:
        """Try tile sizes for decode on whatever lies in the slots, unless this shape has been tuned
        before.
        """
        if (
            self._blocks is not None
            or self._tuned.get(layout, top_k) is not None
            or len(buffer) < top_k
        ):
            return
        hidden = torch.zeros(1, layout.gate.columns, dtype=torch.bfloat16, device=self._device)
        weights = torch.ones(1, top_k, device=self._device)
        calls = cycle(
            [
                SlotCall(
                    buffer,
                    layout,
                    slots,
                    hidden,
                    torch.tensor([slots], device=self._device),
                    weights,
                )
                for slots in slot_groups(len(buffer), top_k, layout)
            ]
        )

        def run(blocks: Blocks) -> tuple[Callable[[], object], Callable[[], object]]:
            activations = self._gate_up_decode(next(calls), blocks)
            return (
                lambda: self._gate_up_decode(next(calls), blocks),
                lambda: self._down_decode(next(calls), activations, blocks),
            )

        self._tuned.put(layout, top_k, tune(Blocks.of(layout, top_k), run, timer))

    def gate_up(self, call: SlotCall) -> Any:
        if len(call.hidden) <= self.decode_tokens:
            return self._gate_up_decode(call, self._sizes(call))
        return self._gate_up_prefill(call)

    def down(self, call: SlotCall, activations: Any) -> torch.Tensor:
        if isinstance(activations, torch.Tensor):
            return self._down_decode(call, activations, self._sizes(call))
        return self._down_prefill(call, *activations)

    def _gate_up_decode(self, call: SlotCall, blocks: Blocks) -> torch.Tensor:
        hidden, layout = call.hidden.contiguous(), call.layout
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

    def _down_decode(
        self, call: SlotCall, activations: torch.Tensor, blocks: Blocks
    ) -> torch.Tensor:
        layout = call.layout
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
            num_warps=blocks.down_warps,
        )
        return output

    def _gate_up_prefill(self, call: SlotCall) -> tuple[torch.Tensor, _Tiles]:
        hidden, layout, blocks = call.hidden.contiguous(), call.layout, self._sizes(call)
        tiles = self._tiles(call)
        inner = layout.gate.rows
        activations = torch.empty(
            call.slot_ids.numel(), inner, dtype=hidden.dtype, device=hidden.device
        )
        gate_up_prefill[(triton.cdiv(inner, blocks.rows), len(tiles.slots))](
            hidden,
            call.buffer,
            *tiles[:4],
            activations,
            call.buffer.stride(0),
            layout.up.offset,
            call.slot_ids.shape[1],
            layout.gate.type_name,
            layout.up.type_name,
            layout.gate.columns,
            inner,
            tiles.tokens,
            blocks.rows,
            self._dot(hidden.dtype),
            num_warps=blocks.prefill_warps,
        )
        return activations, tiles

    def _down_prefill(
        self, call: SlotCall, activations: torch.Tensor, tiles: _Tiles
    ) -> torch.Tensor:
        layout, blocks = call.layout, self._sizes(call)
        tokens, width = call.hidden.shape
        # Pairs without a slot keep their zeros.
        parts = torch.zeros(
            call.slot_ids.numel(), width, dtype=call.hidden.dtype, device=call.hidden.device
        )
        down_prefill[(triton.cdiv(width, blocks.rows), len(tiles.slots))](
            activations,
            call.buffer,
            *tiles[:4],
            call.topk_weights.contiguous(),
            parts,
            call.buffer.stride(0),
            layout.down.offset,
            layout.down.type_name,
            width,
            layout.down.columns,
            tiles.tokens,
            blocks.rows,
            self._dot(call.hidden.dtype),
            num_warps=blocks.prefill_warps,
        )
        return parts.view(tokens, -1, width).sum(dim=1)

    def _tiles(self, call: SlotCall) -> _Tiles:
        """Sort and cut on the device, by its own operations only: nothing is read back."""
        count, pairs = len(call.slots), call.slot_ids.numel()
        size = self._sizes(call).tile_tokens(pairs, count)
        device = call.hidden.device
        places, slots = self._slot_places(call)
        keys = places[call.slot_ids.flatten()]  # -1, without a slot, reads the last entry: `count`
        sorted_keys, order = keys.sort(stable=True)
        bounds = torch.searchsorted(sorted_keys, torch.arange(count + 1, device=device))
        begin, end = bounds[:-1], bounds[1:]
        last_tiles = ((end - begin + size - 1) // size).cumsum(0)
        number = (
            triton.cdiv(pairs, size) + count
        )  # never fewer than needed: one part-filled tile for each slot
        tile = torch.arange(number, device=device)
        owner = torch.searchsorted(last_tiles, tile, right=True).clamp_(max=count - 1)
        within = tile - torch.where(owner > 0, last_tiles[owner - 1], 0)
        firsts = begin[owner] + within * size
        ends = torch.minimum(firsts + size, end[owner])
        used = tile < last_tiles[-1]
        return _Tiles(order, torch.where(used, slots[owner], -1), firsts, ends, size)

    def _slot_places(self, call: SlotCall) -> tuple[torch.Tensor, torch.Tensor]:
        """(slot -> place in `call.slots`, with `len(call.slots)` for all others and for -1; the
        slots).
        """
        device = call.hidden.device
        slots = torch.tensor(call.slots)
        places = torch.full((len(call.buffer) + 1,), len(call.slots))
        places[slots] = torch.arange(len(call.slots))
        if device.type == "cuda":
            places, slots = places.pin_memory(), slots.pin_memory()
        return places.to(device, non_blocking=True), slots.to(device, non_blocking=True)

    def _sizes(self, call: SlotCall) -> Blocks:
        top_k = call.slot_ids.shape[1]
        return self._blocks or self._tuned.get(call.layout, top_k) or Blocks.of(call.layout, top_k)

    def _dot(self, dtype: torch.dtype) -> Any:
        """The type of `tl.dot`'s operands: hidden's own; float32 in the interpreter, which has no
        bfloat16 product.
        """
        if self._interpreted:
            return tl.float32
        return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)
