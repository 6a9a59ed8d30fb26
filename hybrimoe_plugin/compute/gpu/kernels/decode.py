"""Few tokens: each program multiplies a block of rows of one expert's matrix with one token.

As in a GEMV, the bytes read decide the time: a row's codes are read once, in order, and scales are
applied to sums over 32 columns instead of to every weight. Sums are float32.
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
def values(vector, column, mask, like, COLUMNS: tl.constexpr):
    """vector[column] float32 in the shape of `like`; 0 beyond the vector."""
    place, _ = tl.broadcast(vector + column, like)
    if COLUMNS % 64 == 0:
        x = tl.load(place, mask, 0.0)
    else:
        x = tl.load(place, mask & (column < COLUMNS), 0.0)
    return x.to(tl.float32)


@triton.jit
def half_sums(lanes):
    """[N, U, 2] sums over the halves of [N, U, 32]."""
    shape: tl.constexpr = (lanes.shape[0], lanes.shape[1], 2, 16)
    return tl.sum(tl.reshape(lanes, shape), axis=3)


@triton.jit
def unit_dots(
    KIND: tl.constexpr,
    matrices,
    vectors,
    tables,
    rows,
    units,
    live,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[N, U] dot products of rows [N] and units [U], where `live` [U] is true.

    Each unit has its own matrix and vector: `matrices` and `vectors` [U] point at the starts of
    what `units` count in.
    """
    row = rows[:, None, None]
    unit = units[None, :, None]
    lane = tl.arange(0, 32)[None, None, :]
    mask = (row < ROWS) & live[None, :, None]
    column = low_columns(KIND, unit, lane)
    low, high = codes(KIND, matrices[None, :, None], tables, row, unit, lane, mask, ROWS, COLUMNS)
    # Each thread loads the values that its own codes need (neighbours share them in L1): a tile of
    # [1, U, 32] would be exchanged through shared memory, with a barrier in every pass of the loop.
    vector = vectors[None, :, None]
    x_low = values(vector, column, mask, low, COLUMNS)
    x_high = values(vector, column + fact(KIND, "step"), mask, low, COLUMNS)
    low *= x_low
    high *= x_high
    # Scales as [N, U]: with a last dimension of 1 each thread would load its own one sixteen times.
    row = rows[:, None]
    unit = units[None, :]
    base = matrices[None, :]
    mask = (row < ROWS) & live[None, :]
    if fact(KIND, "scales") == "":
        dots = tl.sum(low + high, axis=2)
    elif fact(KIND, "scales") == "unit":
        if fact(KIND, "minima"):
            s_low, s_high, m_low, m_high = k_scales(KIND, base, row, unit, mask, ROWS, COLUMNS)
            dots = s_low * tl.sum(low, axis=2) + s_high * tl.sum(high, axis=2)
            dots -= m_low * tl.sum(x_low, axis=2) + m_high * tl.sum(x_high, axis=2)
        else:
            s_low, s_high = pair_scales(KIND, base, row, unit, mask, ROWS, COLUMNS)
            dots = s_low * tl.sum(low, axis=2) + s_high * tl.sum(high, axis=2)
    else:
        row = rows[:, None, None]
        unit = units[None, :, None]
        base = matrices[None, :, None]
        half = tl.arange(0, 2)[None, None, :]
        mask = (row < ROWS) & live[None, :, None] & (half >= 0)
        s_low, s_high = half_scales(KIND, base, row, unit, half, mask, ROWS, COLUMNS)
        parts = s_low * half_sums(low) + s_high * half_sums(high)
        if fact(KIND, "minima"):
            m_low, m_high = half_minima(KIND, base, row, unit, half, mask, ROWS, COLUMNS)
            parts -= m_low * half_sums(x_low) + m_high * half_sums(x_high)
        dots = tl.sum(parts, axis=2)
    return dots


@triton.jit
def gate_up_decode(
    hidden,
    slots,
    slot_ids,
    activations,
    tables,
    slot_bytes,
    up_offset,
    TOP_K: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BIASES: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_SHIFT: tl.constexpr,
):
    """activations[pair, INNER] float32 of routed pairs with a slot; grid (row blocks, T * K)."""
    pair = tl.program_id(1)
    slot = tl.load(slot_ids + pair)
    if slot >= 0:
        units = tl.arange(0, BLOCK_UNITS)
        matrices = slots + slot.to(tl.int64) * slot_bytes + units * 0
        vectors = hidden + (pair // TOP_K) * HIDDEN + units * 0
        rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        gate = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
        up = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
        for first in range(0, (HIDDEN + 63) // 64, BLOCK_UNITS):
            unit = first + units
            live = unit * 64 < HIDDEN
            gate += unit_dots(GATE, matrices, vectors, tables, rows, unit, live, INNER, HIDDEN)
            up += unit_dots(
                UP, matrices + up_offset, vectors, tables, rows, unit, live, INNER, HIDDEN
            )
        gate_sum = tl.sum(gate, axis=1)
        up_sum = tl.sum(up, axis=1)
        if BIASES >= 0:
            own = slots + slot.to(tl.int64) * slot_bytes
            gate_sum += biases(own, 0, rows, BIASES, INNER)
            up_sum += biases(own, INNER, rows, BIASES, INNER)
        value = activated(gate_sum, up_sum, KIND, ALPHA, LIMIT, UP_SHIFT)
        tl.store(activations + pair * INNER + rows, value, rows < INNER)


@triton.jit
def down_decode(
    activations,
    slots,
    slot_ids,
    weights,
    output,
    tables,
    slot_bytes,
    down_offset,
    TOP_K: tl.constexpr,
    PLACES: tl.constexpr,
    DOWN: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BIASES: tl.constexpr,
):
    """output[T, HIDDEN]; grid (row blocks, T).

    A program's tile holds BLOCK_UNITS units of each of the token's experts (PLACES is TOP_K or the
    power of two above). So all experts' bytes are in flight at once, and sums have one order
    whatever the timing.
    """
    token = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    spread = tl.arange(0, PLACES * BLOCK_UNITS)
    place = spread // BLOCK_UNITS
    units = spread % BLOCK_UNITS
    pairs = token * TOP_K + place
    slot = tl.load(slot_ids + pairs, place < TOP_K, -1)
    weight = tl.load(weights + pairs, slot >= 0, 0.0).to(tl.float32)
    matrices = slots + slot.to(tl.int64) * slot_bytes + down_offset
    vectors = activations + pairs * INNER
    total = tl.zeros((BLOCK_ROWS, PLACES * BLOCK_UNITS), tl.float32)
    for first in range(0, (INNER + 63) // 64, BLOCK_UNITS):
        unit = first + units
        live = (slot >= 0) & (unit * 64 < INNER)
        dots = unit_dots(DOWN, matrices, vectors, tables, rows, unit, live, HIDDEN, INNER)
        total += weight[None, :] * dots
    if BIASES >= 0:
        # One unit of each expert adds its biases: their sum comes below.
        own = slots + slot.to(tl.int64) * slot_bytes
        first = (slot >= 0) & (units == 0)
        base = (own[None, :] + BIASES).to(tl.pointer_type(tl.float32), bitcast=True)
        mask = (rows[:, None] < HIDDEN) & first[None, :]
        total += weight[None, :] * tl.load(base + 2 * INNER + rows[:, None], mask, 0.0)
    tl.store(output + token * HIDDEN + rows, tl.sum(total, axis=1), rows < HIDDEN)
