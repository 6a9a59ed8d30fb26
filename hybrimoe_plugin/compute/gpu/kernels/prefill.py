"""Many tokens: pairs sorted by slot, one tile of tokens times one tile of rows per program.

Weights are converted to the tiles' type (bf16 on a GPU) right before `tl.dot`, as in a GEMM; sums
are float32.
"""

# Triton's idiom: constants in capitals, arguments without Python types. Kernels stay dense: their
# operations and the order of these are what is compiled and compared bit for bit.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.epilogue import activated, biases
from hybrimoe_plugin.compute.gpu.kernels.formats.codes import codes, low_columns
from hybrimoe_plugin.compute.gpu.kernels.formats.facts import fact
from hybrimoe_plugin.compute.gpu.kernels.formats.scales import (
    half_minima,
    half_scales,
    k_scales,
    pair_scales,
)


@triton.jit
def unit_weights(
    KIND: tl.constexpr, base, tables, rows, unit, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """([N, 32], [N, 32]) float32 weights of rows [N] in one unit's low and high columns."""
    row = rows[:, None]
    lane = tl.arange(0, 32)[None, :]
    low, high = codes(KIND, base, tables, row, unit, lane, row < ROWS, ROWS, COLUMNS)
    # Scales are loaded once for a row and widened then: as [N, 1] each thread would load its own
    # one sixteen times.
    if fact(KIND, "scales") == "unit":
        mask = rows < ROWS
        if fact(KIND, "minima"):
            s_low, s_high, m_low, m_high = k_scales(KIND, base, rows, unit, mask, ROWS, COLUMNS)
            low = s_low[:, None] * low - m_low[:, None]
            high = s_high[:, None] * high - m_high[:, None]
        else:
            s_low, s_high = pair_scales(KIND, base, rows, unit, mask, ROWS, COLUMNS)
            low *= s_low[:, None]
            high *= s_high[:, None]
    elif fact(KIND, "scales") == "half":
        half = tl.arange(0, 2)[None, :]
        mask = (row < ROWS) & (half >= 0)
        halves: tl.constexpr = (rows.shape[0], 2, 16)
        s_low, s_high = half_scales(KIND, base, row, unit, half, mask, ROWS, COLUMNS)
        scaled_low = tl.reshape(low, halves) * s_low[:, :, None]
        scaled_high = tl.reshape(high, halves) * s_high[:, :, None]
        if fact(KIND, "minima"):
            m_low, m_high = half_minima(KIND, base, row, unit, half, mask, ROWS, COLUMNS)
            scaled_low -= m_low[:, :, None]
            scaled_high -= m_high[:, :, None]
        low = tl.reshape(scaled_low, low.shape)
        high = tl.reshape(scaled_high, high.shape)
    return low, high


@triton.jit
def add_unit(
    total,
    KIND: tl.constexpr,
    base,
    tables,
    rows,
    unit,
    states,
    states_mask,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
):
    """total [M, N] + states [M, unit] times the unit's weights.

    `states` [M, 1] points at each token's first column.
    """
    low, high = unit_weights(KIND, base, tables, rows, unit, ROWS, COLUMNS)
    column = low_columns(KIND, unit, tl.arange(0, 32)[None, :])
    if COLUMNS % 64 == 0:
        x_low = tl.load(states + column, states_mask, 0.0)
        x_high = tl.load(states + column + fact(KIND, "step"), states_mask, 0.0)
    else:
        x_low = tl.load(states + column, states_mask & (column < COLUMNS), 0.0)
        high_at = states + column + fact(KIND, "step")
        high_mask = states_mask & (column + fact(KIND, "step") < COLUMNS)
        x_high = tl.load(high_at, high_mask, 0.0)
    total = tl.dot(x_low.to(DOT), tl.trans(low.to(DOT)), total, input_precision="ieee")
    return tl.dot(x_high.to(DOT), tl.trans(high.to(DOT)), total, input_precision="ieee")


@triton.jit
def gate_up_prefill(
    hidden,
    slots,
    order,
    tile_slots,
    tile_firsts,
    tile_ends,
    activations,
    tables,
    slot_bytes,
    up_offset,
    TOP_K: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
    BIASES: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_SHIFT: tl.constexpr,
):
    """activations[place, INNER] in sorted order; grid (row blocks, tiles).

    A tile holds up to BLOCK_TOKENS pairs of one slot: `order` of places `tile_firsts` to
    `tile_ends`. `tile_slots` is -1 for a tile without pairs.
    """
    tile = tl.program_id(1)
    slot = tl.load(tile_slots + tile)
    if slot >= 0:
        base = slots + slot.to(tl.int64) * slot_bytes
        places = tl.load(tile_firsts + tile) + tl.arange(0, BLOCK_TOKENS)
        places_mask = places < tl.load(tile_ends + tile)
        token = tl.load(order + places, places_mask, 0) // TOP_K
        states = (hidden + token * HIDDEN)[:, None]
        states_mask = places_mask[:, None]
        rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        gate = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.float32)
        up = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.float32)
        for unit in range((HIDDEN + 63) // 64):
            gate = add_unit(
                gate, GATE, base, tables, rows, unit, states, states_mask, INNER, HIDDEN, DOT
            )
            up_base = base + up_offset
            up = add_unit(
                up, UP, up_base, tables, rows, unit, states, states_mask, INNER, HIDDEN, DOT
            )
        if BIASES >= 0:
            gate += biases(base, 0, rows, BIASES, INNER)[None, :]
            up += biases(base, INNER, rows, BIASES, INNER)[None, :]
        value = activated(gate, up, KIND, ALPHA, LIMIT, UP_SHIFT)
        target = activations + places[:, None] * INNER + rows[None, :]
        rounded = value.to(activations.dtype.element_ty)
        tl.store(target, rounded, states_mask & (rows[None, :] < INNER))


@triton.jit
def down_prefill(
    activations,
    slots,
    order,
    tile_slots,
    tile_firsts,
    tile_ends,
    weights,
    parts,
    tables,
    slot_bytes,
    down_offset,
    DOWN: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
    BIASES: tl.constexpr,
):
    """parts[pair, HIDDEN], each with its routing weight applied; grid (row blocks, tiles).

    Tiles as in `gate_up_prefill`.
    """
    tile = tl.program_id(1)
    slot = tl.load(tile_slots + tile)
    if slot >= 0:
        base = slots + slot.to(tl.int64) * slot_bytes + down_offset
        places = tl.load(tile_firsts + tile) + tl.arange(0, BLOCK_TOKENS)
        places_mask = places < tl.load(tile_ends + tile)
        states = (activations + places * INNER)[:, None]
        states_mask = places_mask[:, None]
        rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        total = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.float32)
        for unit in range((INNER + 63) // 64):
            total = add_unit(
                total, DOWN, base, tables, rows, unit, states, states_mask, HIDDEN, INNER, DOT
            )
        if BIASES >= 0:
            own = slots + slot.to(tl.int64) * slot_bytes
            total += biases(own, 2 * INNER, rows, BIASES, HIDDEN)[None, :]
        pair = tl.load(order + places, places_mask, 0)
        share = tl.load(weights + pair, places_mask, 0.0).to(tl.float32)
        total *= share[:, None]
        target = parts + pair[:, None] * HIDDEN + rows[None, :]
        rounded = total.to(parts.dtype.element_ty)
        tl.store(target, rounded, states_mask & (rows[None, :] < HIDDEN))
