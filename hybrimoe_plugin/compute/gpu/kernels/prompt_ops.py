"""Launch the Triton kernels for many tokens: two launches a wave and one sum a layer call."""

from __future__ import annotations

import triton

from hybrimoe_plugin.compute.gpu.kernels.base import (
    PromptKernels,
    PromptWave,
    SlotCall,
    prompt_rows,
)
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.epilogue import Epilogue
from hybrimoe_plugin.compute.gpu.kernels.formats.tables import tables
from hybrimoe_plugin.compute.gpu.kernels.linear import dot_type
from hybrimoe_plugin.compute.gpu.kernels.prefill import down_prefill, gate_up_prefill
from hybrimoe_plugin.compute.gpu.kernels.tiles import SortedPairs, cut_waves


def gate_up_tiles(wave: PromptWave, blocks: Blocks, interpreted: bool) -> None:
    """`PromptKernels.gate_up_prompt`."""
    layout, tiles, hidden = wave.layout, wave.tiles, wave.hidden
    inner = layout.gate.rows
    grid = (triton.cdiv(inner, blocks.rows), len(tiles.slots))
    gate_up_prefill[grid](
        hidden,
        wave.buffer,
        tiles.order,
        tiles.slots,
        tiles.firsts,
        tiles.ends,
        wave.activations,
        tables((layout.gate.type_name, layout.up.type_name), wave.buffer),
        wave.buffer.stride(0),
        layout.up.offset,
        wave.topk_weights.shape[1],
        layout.gate.type_name,
        layout.up.type_name,
        layout.gate.columns,
        inner,
        tiles.tokens,
        blocks.rows,
        dot_type(hidden.dtype, interpreted),
        *Epilogue.of(layout),
        num_warps=blocks.prefill_warps,
    )


def down_tiles(wave: PromptWave, blocks: Blocks, interpreted: bool) -> None:
    """`PromptKernels.down_prompt`."""
    layout, tiles = wave.layout, wave.tiles
    width = wave.hidden.shape[1]
    grid = (triton.cdiv(width, blocks.rows), len(tiles.slots))
    down_prefill[grid](
        wave.activations,
        wave.buffer,
        tiles.order,
        tiles.slots,
        tiles.firsts,
        tiles.ends,
        wave.topk_weights,
        wave.parts,
        tables((layout.down.type_name,), wave.buffer),
        wave.buffer.stride(0),
        layout.down.offset,
        layout.down.type_name,
        width,
        layout.down.columns,
        tiles.tokens,
        blocks.rows,
        dot_type(wave.hidden.dtype, interpreted),
        Epilogue.of(layout).bias_offset,
        num_warps=blocks.prefill_warps,
    )


def read_back(call: SlotCall, kernels: PromptKernels) -> PromptWave:
    """A wave of a call whose routing only the device has; stops the host."""
    layout, top_k = call.layout, call.slot_ids.shape[1]
    # Slots stand for experts, each one higher: pairs without a slot come first.
    pairs = SortedPairs(call.slot_ids.cpu().numpy() + 1, len(call.buffer) + 1)
    wave = {slot + 1: slot for slot in call.slots}
    (tiles,) = cut_waves(
        pairs,
        [wave],
        lambda count, slots: kernels.tile_tokens(layout, top_k, count, slots),
        lambda numbers: numbers.to(call.hidden.device),
    )
    hidden = call.hidden.contiguous()
    activations, parts = prompt_rows(hidden, top_k, layout.gate.rows, whole=False)
    weights = call.topk_weights.contiguous()
    return PromptWave(call.buffer, layout, hidden, weights, tiles, activations, parts)
