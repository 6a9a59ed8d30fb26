"""Launch the Triton kernels: one launch for each stage, whatever the number of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import triton

from hybrimoe_plugin.compute.gpu.kernels.base import PromptWave, SlotCall, token_sums
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.decode import down_decode, gate_up_decode
from hybrimoe_plugin.compute.gpu.kernels.epilogue import Epilogue
from hybrimoe_plugin.compute.gpu.kernels.formats.description import FORMATS, SUPPORTED
from hybrimoe_plugin.compute.gpu.kernels.formats.tables import tables
from hybrimoe_plugin.compute.gpu.kernels.int8.launch import Int8Decode
from hybrimoe_plugin.compute.gpu.kernels.int8.proof import agrees
from hybrimoe_plugin.compute.gpu.kernels.layout import Part, SlotLayout, slot_layout
from hybrimoe_plugin.compute.gpu.kernels.prompt_ops import (
    down_tiles,
    gate_up_tiles,
    read_back,
)
from hybrimoe_plugin.compute.gpu.kernels.repack import (
    REPACKED_BLOCKS,
    ExpertRepacker,
    blocks_to_planes,
    part_shape,
)
from hybrimoe_plugin.compute.gpu.kernels.tuning import Tuned, slot_groups, tune
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.device.cuda_timer import Timer
from hybrimoe_plugin.policy.step import FEW_ROWS

DECODE_LOAD, INT8_DECODE_LOAD = 1.5, 3.0
"""Most tokens that experts have on average in a call of few rows that the decode kernels take.

They unpack an expert's weights for each of its tokens, the prompt kernels once for 16. Counted in
what is compiled for sm_90 at Qwen3-30B-A3B's shape, instructions a weight of gate and up: Q4_K 9.6
for a token in floating point, 1.7 in int8, and 9.2 for a tile; Q8_0 6.5, 1.0 and 6.1. In
floating point the half is for the host, which cuts and sends no tiles then. In int8 instructions
alone would allow 5, but each token reads the weights anew, at best from the device's cache.
"""


class TritonKernels:
    """Fused grouped kernels.

    Args:
        device: a CUDA device, or the CPU under Triton's interpreter.
        blocks: tile sizes; by default tuned ones, or those that follow from the layer's shape.
        decode_tokens: calls of up to this many tokens may take the decode kernels, and do where
            the host does not know their routing.
        tuned: file in which tuned sizes are kept; None for memory only.
        activations: what decode kernels multiply, for the types that can: float, int8, or `auto`
            for int8 once that has proved itself (`prove`).
    """

    name = "triton"

    def __init__(
        self,
        device: torch.device,
        blocks: Blocks | None = None,
        decode_tokens: int = FEW_ROWS,
        tuned: Path | None = None,
        activations: str = "float",
    ) -> None:
        self._device = device
        self._activations = activations
        self._blocks = blocks
        self._tuned = Tuned(tuned)
        self.decode_tokens = decode_tokens
        self._interpreted = device.type == "cpu"
        self._int8 = self._make_int8() if activations == "int8" else None

    def refusal(self, spec: ExpertSpec) -> str | None:
        matrices = (
            (spec.gate_type, spec.hidden),
            (spec.up_type, spec.hidden),
            (spec.down_type, spec.intermediate),
        )
        for kind, columns in matrices:
            if kind not in SUPPORTED:
                return f"no Triton kernel for GGML type {kind}; there is for {', '.join(SUPPORTED)}"
            if columns % max(32, FORMATS[kind].values):
                return f"{columns} columns are no whole number of {kind} blocks"
        return None

    def capturable(self) -> TritonKernels:
        return self

    def layout(self, spec: ExpertSpec) -> SlotLayout:
        return slot_layout(spec, planar=True)

    def repacker(self, parts: tuple[Part, ...]) -> ExpertRepacker:
        """As `layer_path.WholeRepacks` says."""
        return ExpertRepacker(parts)

    def repack(self, part: Part, raw: torch.Tensor, target: torch.Tensor) -> None:
        size, _, blocks, block_words, offsets, words = part_shape(part)
        word = torch.int16 if size == 2 else torch.uint8
        grid = (triton.cdiv(blocks, REPACKED_BLOCKS),)
        blocks_to_planes[grid](
            *(raw.view(word), target.view(word), blocks),
            *(block_words, offsets, words, REPACKED_BLOCKS),
        )

    def prove(self, shapes: Sequence[tuple[SlotLayout, int]], buffer: torch.Tensor) -> None:
        """As the protocol says (`Tunable`); only where activations are `auto`."""
        if self._activations != "auto" or not len(buffer):
            return
        int8 = self._make_int8()
        agree = agrees(shapes, buffer, TritonKernels(self._device), int8)
        self._int8 = int8 if agree else None

    def tune(self, layout: SlotLayout, top_k: int, buffer: torch.Tensor, timer: Timer) -> None:
        """As the protocol says (`Tunable`)."""
        known = self._known_sizes(layout, top_k)
        if known is not None or len(buffer) < top_k:
            return
        hidden = torch.zeros(1, layout.gate.columns, dtype=torch.bfloat16, device=self._device)
        weights = torch.ones(1, top_k, device=self._device)
        calls = []
        for slots in slot_groups(len(buffer), top_k, layout):
            slot_ids = torch.tensor([slots], device=self._device)
            calls.append(SlotCall(buffer, layout, slots, hidden, slot_ids, weights))
        turns = cycle(calls)

        def run(blocks: Blocks) -> tuple[Callable[[], object], Callable[[], object]]:
            activations = self._gate_up_decode(next(turns), blocks)
            return (
                lambda: self._gate_up_decode(next(turns), blocks),
                lambda: self._down_decode(next(turns), activations, blocks),
            )

        best = tune(self._first_sizes(layout, top_k), run, timer)
        self._tuned.put(layout, top_k, best, self._uses_int8(layout))

    def gate_up(self, call: SlotCall) -> Any:
        """As the protocol says; for many tokens the host waits for the slot ids."""
        if len(call.hidden) <= self.decode_tokens:
            return self._gate_up_decode(call, self._sizes(call))
        wave = read_back(call, self)
        self.gate_up_prompt(wave)
        return wave

    def down(self, call: SlotCall, activations: Any) -> torch.Tensor:
        if isinstance(activations, torch.Tensor):
            return self._down_decode(call, activations, self._sizes(call))
        self.down_prompt(activations)
        return token_sums(activations.parts, len(call.hidden))

    def tiles(self, layout: SlotLayout, tokens: int, load: float) -> bool:
        if tokens > self.decode_tokens:
            return True
        return load > (INT8_DECODE_LOAD if self._uses_int8(layout) else DECODE_LOAD)

    def tile_tokens(self, layout: SlotLayout, top_k: int, pairs: int, slots: int) -> int:
        return self._blocks_of(layout, top_k).tile_tokens(pairs, slots)

    def gate_up_prompt(self, wave: PromptWave) -> None:
        gate_up_tiles(wave, self._prompt_blocks(wave), self._interpreted)

    def down_prompt(self, wave: PromptWave) -> None:
        down_tiles(wave, self._prompt_blocks(wave), self._interpreted)

    def _gate_up_decode(self, call: SlotCall, blocks: Blocks) -> torch.Tensor:
        """[T * K, I] float32, or bfloat16 on the way to int8."""
        layout = call.layout
        hidden = call.hidden.contiguous()
        inner = layout.gate.rows
        pairs = call.slot_ids.numel()
        int8 = self._int8
        narrow = int8 is not None and int8.takes_down(layout) and hidden.dtype == torch.bfloat16
        dtype = torch.bfloat16 if narrow else torch.float32
        activations = torch.empty(pairs, inner, dtype=dtype, device=hidden.device)
        if int8 is not None and int8.takes_gate_up(layout):
            int8.gate_up(call, activations, blocks)
            return activations
        grid = (triton.cdiv(inner, blocks.gate_rows), pairs)
        gate_up_decode[grid](
            hidden,
            call.buffer,
            call.slot_ids.contiguous(),
            activations,
            tables((layout.gate.type_name, layout.up.type_name), call.buffer),
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
            num_warps=blocks.decode_warps,
        )
        return activations

    def _down_decode(
        self, call: SlotCall, activations: torch.Tensor, blocks: Blocks
    ) -> torch.Tensor:
        """[T, H]."""
        layout = call.layout
        tokens, width = call.hidden.shape
        top_k = call.slot_ids.shape[1]
        output = torch.empty_like(call.hidden, memory_format=torch.contiguous_format)
        int8 = self._int8
        if int8 is not None and int8.takes_down(layout):
            int8.down(call, activations, output, blocks)
            return output
        grid = (triton.cdiv(width, blocks.down_rows), tokens)
        down_decode[grid](
            activations,
            call.buffer,
            call.slot_ids.contiguous(),
            call.topk_weights.contiguous(),
            output,
            tables((layout.down.type_name,), call.buffer),
            call.buffer.stride(0),
            layout.down.offset,
            top_k,
            triton.next_power_of_2(top_k),
            layout.down.type_name,
            width,
            layout.down.columns,
            blocks.down_rows,
            blocks.down_units,
            Epilogue.of(layout).bias_offset,
            num_warps=blocks.down_warps,
        )
        return output

    def _sizes(self, call: SlotCall) -> Blocks:
        """Tile sizes for a call of few tokens."""
        return self._blocks_of(call.layout, call.slot_ids.shape[1])

    def _prompt_blocks(self, wave: PromptWave) -> Blocks:
        return self._blocks_of(wave.layout, wave.topk_weights.shape[1])

    def _blocks_of(self, layout: SlotLayout, top_k: int) -> Blocks:
        return self._known_sizes(layout, top_k) or self._first_sizes(layout, top_k)

    def _known_sizes(self, layout: SlotLayout, top_k: int) -> Blocks | None:
        return self._blocks or self._tuned.get(layout, top_k, self._uses_int8(layout))

    def _first_sizes(self, layout: SlotLayout, top_k: int) -> Blocks:
        sizes = Blocks.of(layout, top_k)
        return sizes if self._int8 is None else self._int8.blocks(layout, top_k, sizes)

    def _uses_int8(self, layout: SlotLayout) -> bool:
        return self._int8 is not None and self._int8.takes(layout)

    def _make_int8(self) -> Int8Decode:
        return Int8Decode(asm=not self._interpreted)
