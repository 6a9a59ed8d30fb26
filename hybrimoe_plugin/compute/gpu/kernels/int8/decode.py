"""Few tokens with int8 activations: the twins of the float kernels for few tokens.

A warp has one unit of 64 columns in each thread and goes through several rows, so what it reads of
the activations serves all of them. A group of 32 columns is an integer sum until its end.
"""

# Triton's idiom: constants in capitals, arguments without Python types. Kernels stay dense: their
# operations and the order of these are what is compiled and compared bit for bit.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.epilogue import activated, biases
from hybrimoe_plugin.compute.gpu.kernels.int8.dots import integer_dots
from hybrimoe_plugin.compute.gpu.kernels.int8.states import padded_columns


@triton.jit
def rows_inside(BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr):
    """[N] rows of a program; those beyond the matrix repeat its last one."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if ROWS % BLOCK_ROWS != 0:
        rows = tl.minimum(rows, ROWS - 1)
    return rows


@triton.jit
def gate_up_int8(
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
    ASM: tl.constexpr,
):
    """activations[pair, INNER] of routed pairs with a slot; grid (row blocks, T * K)."""
    pair = tl.program_id(1)
    slot = tl.load(slot_ids + pair)
    if slot >= 0:
        units = tl.arange(0, BLOCK_UNITS)
        own = slots + slot.to(tl.int64) * slot_bytes
        state_bytes: tl.constexpr = padded_columns(HIDDEN) * 11 // 8
        states = hidden + (pair // TOP_K) * state_bytes + units * 0
        rows = rows_inside(BLOCK_ROWS, INNER)
        gate = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
        up = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
        for first in range(0, (HIDDEN + 63) // 64, BLOCK_UNITS):
            unit = first + units
            live = unit * 64 < HIDDEN
            matrices = own + units * 0
            dots = integer_dots(
                GATE, matrices, states, tables, rows, unit, live, INNER, HIDDEN, ASM
            )
            gate += tl.where(live[None, :], dots, 0.0)
            matrices = own + up_offset + units * 0
            dots = integer_dots(UP, matrices, states, tables, rows, unit, live, INNER, HIDDEN, ASM)
            up += tl.where(live[None, :], dots, 0.0)
        gate_sum = tl.sum(gate, axis=1)
        up_sum = tl.sum(up, axis=1)
        if BIASES >= 0:
            gate_sum += biases(own, 0, rows, BIASES, INNER)
            up_sum += biases(own, INNER, rows, BIASES, INNER)
        value = activated(gate_sum, up_sum, KIND, ALPHA, LIMIT, UP_SHIFT)
        rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        tl.store(activations + pair * INNER + rows, value, rows < INNER)


@triton.jit
def down_int8(
    activations,
    slots,
    slot_ids,
    weights,
    output,
    tables,
    slot_bytes,
    down_offset,
    TOP_K: tl.constexpr,
    DOWN: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BIASES: tl.constexpr,
    ASM: tl.constexpr,
):
    """output[T, HIDDEN]; grid (row blocks, T).

    The units of all of a token's experts stand in one row, of which a pass takes BLOCK_UNITS. So no
    thread is left without one, whatever an expert's number of them, and sums have one order.
    """
    token = tl.program_id(1)
    rows = rows_inside(BLOCK_ROWS, HIDDEN)
    inner_units: tl.constexpr = (INNER + 63) // 64
    state_bytes: tl.constexpr = padded_columns(INNER) * 11 // 8
    total = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    for first in range(0, TOP_K * inner_units, BLOCK_UNITS):
        spread = first + tl.arange(0, BLOCK_UNITS)
        place = spread // inner_units
        unit = spread % inner_units
        pairs = token * TOP_K + place
        slot = tl.load(slot_ids + pairs, place < TOP_K, -1)
        live = slot >= 0
        weight = tl.load(weights + pairs, live, 0.0).to(tl.float32)
        matrices = slots + slot.to(tl.int64) * slot_bytes + down_offset
        states = activations + pairs * state_bytes
        dots = integer_dots(DOWN, matrices, states, tables, rows, unit, live, HIDDEN, INNER, ASM)
        if BIASES >= 0:
            # One unit of each expert adds its biases.
            own = slots + slot.to(tl.int64) * slot_bytes
            base = (own[None, :] + BIASES).to(tl.pointer_type(tl.float32), bitcast=True)
            mask = tl.broadcast_to((live & (unit == 0))[None, :], dots.shape)
            dots += tl.load(base + 2 * INNER + rows[:, None], mask, 0.0)
        total += tl.where(live[None, :], weight[None, :] * dots, 0.0)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tl.store(output + token * HIDDEN + rows, tl.sum(total, axis=1), rows < HIDDEN)
