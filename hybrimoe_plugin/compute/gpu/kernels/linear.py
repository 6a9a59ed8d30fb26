"""Dense linears on quantised matrices in device memory: the experts' kernels for one matrix."""

# Triton's idiom: constants in capitals, arguments without Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.decode import unit_dots
from hybrimoe_plugin.compute.gpu.kernels.formats.tables import tables
from hybrimoe_plugin.compute.gpu.kernels.prefill import add_unit

DECODE_TOKENS = 8
_TILE_ROWS = 64


@triton.jit
def linear_decode(
    states,
    matrix,
    output,
    tables,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """output[T, ROWS]; grid (row blocks, T)."""
    token = tl.program_id(1)
    units = tl.arange(0, BLOCK_UNITS)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    for first in range(0, (COLUMNS + 63) // 64, BLOCK_UNITS):
        unit = first + units
        live = unit * 64 < COLUMNS
        total += unit_dots(
            KIND,
            matrix + units * 0,
            states + token * COLUMNS + units * 0,
            tables,
            rows,
            unit,
            live,
            ROWS,
            COLUMNS,
        )
    tl.store(output + token * ROWS + rows, tl.sum(total, axis=1), rows < ROWS)


@triton.jit
def linear_prefill(
    states,
    matrix,
    output,
    tables,
    tokens,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
):
    """output[T, ROWS]; grid (row blocks, token tiles)."""
    token = (tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), tl.float32)
    for unit in range((COLUMNS + 63) // 64):
        total = add_unit(
            total,
            KIND,
            matrix,
            tables,
            rows,
            unit,
            states + token * COLUMNS,
            token < tokens,
            ROWS,
            COLUMNS,
            DOT,
        )
    inside = (token < tokens) & (rows[None, :] < ROWS)
    tl.store(output + token * ROWS + rows[None, :], total.to(output.dtype.element_ty), inside)


def linear(states: torch.Tensor, matrix: torch.Tensor, type_name: str, rows: int) -> torch.Tensor:
    """[T, rows] of states' dtype: states times a quantised matrix, on one device.

    Args:
        states: [T, columns] floating point.
        matrix: [bytes] uint8 in slot form (`layout`).
        type_name: the matrix's GGML type.
    """
    tokens, columns = states.shape
    output = torch.empty(tokens, rows, dtype=states.dtype, device=states.device)
    grids = tables((type_name,), matrix)
    if tokens <= DECODE_TOKENS:
        units = min(32, triton.next_power_of_2(triton.cdiv(columns, 64)))
        block = max(1, 128 // units)
        linear_decode[(triton.cdiv(rows, block), tokens)](
            states.contiguous(), matrix, output, grids, type_name, rows, columns, block, units
        )
        return output
    block = max(16, min(64, triton.next_power_of_2(tokens)))
    linear_prefill[(triton.cdiv(rows, _TILE_ROWS), triton.cdiv(tokens, block))](
        states.contiguous(),
        matrix,
        output,
        grids,
        tokens,
        type_name,
        rows,
        columns,
        block,
        _TILE_ROWS,
        dot_type(states.dtype, interpreted=states.device.type == "cpu"),
    )
    return output


def dot_type(dtype: torch.dtype, interpreted: bool) -> tl.dtype:
    """The type of `tl.dot`'s operands: that of the states.

    Args:
        interpreted: whether kernels run in Triton's interpreter, which has no bfloat16 product.
    """
    if interpreted:
        return tl.float32
    if dtype == torch.bfloat16:
        return tl.bfloat16
    if dtype == torch.float16:
        return tl.float16
    return tl.float32
