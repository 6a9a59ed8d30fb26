"""GGML blocks inside Triton kernels: codes and scales of units of 64 columns.

Every type is read as `w = scale * code - minimum`. A unit holds 32 lanes, and each lane a *low* and
a *high* column (the low and high nibble of one byte in 4-bit types, else a column and the one 32
further), so that all types share one loop. Row, unit and lane arrive as tensors that broadcast
against each other: [N, 1, 1], [1, U, 1], [1, 1, 32] in the decode kernels, [N, 1], a number, [1,
32] in the prefill kernels.

Formats: https://github.com/ggml-org/ggml, src/ggml-common.h; planes: `layout.PLANES`.
"""

# Triton's idiom: constants in capitals, arguments without Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

SUPPORTED = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "BF16", "F16")


@triton.jit
def low_columns(KIND: tl.constexpr, unit, lane):
    """The column of each lane's low half."""
    if KIND == "Q6_K":
        column = (unit // 2) * 128 + (unit % 2) * 32 + lane
    elif KIND == "Q4_0":
        column = unit * 64 + (lane // 16) * 32 + lane % 16
    else:
        column = unit * 64 + lane
    return column


@triton.jit
def high_step(KIND: tl.constexpr):
    """How far the high column lies beyond the low one."""
    step: tl.constexpr = 64 if KIND == "Q6_K" else 16 if KIND == "Q4_0" else 32
    return step


@triton.jit
def codes(
    KIND: tl.constexpr, base, row, unit, lane, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """(low, high) float32 codes of each lane; `mask` hides rows and units beyond the matrix."""
    if KIND == "Q4_K":
        packed = tl.load(
            base + (row * (COLUMNS // 256) + unit // 4) * 144 + 16 + (unit % 4) * 32 + lane, mask, 0
        )
        low, high = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
    elif KIND == "Q5_K":
        block = base + (row * (COLUMNS // 256) + unit // 4) * 176
        chunk = unit % 4
        packed = tl.load(block + 48 + chunk * 32 + lane, mask, 0).to(tl.int32)
        bits = tl.load(block + 16 + lane, mask, 0).to(tl.int32) >> (2 * chunk)
        low = ((packed & 15) | ((bits & 1) << 4)).to(tl.float32)
        high = ((packed >> 4) | ((bits & 2) << 3)).to(tl.float32)
    elif KIND == "Q6_K":
        blocks: tl.constexpr = ROWS * COLUMNS // 256
        block = row * (COLUMNS // 256) + unit // 4
        half, side = (unit % 4) // 2, unit % 2
        packed = tl.load(base + block * 128 + (unit % 4) * 32 + lane, mask, 0).to(tl.int32)
        bits = tl.load(base + blocks * 128 + block * 64 + half * 32 + lane, mask, 0).to(
            tl.int32
        ) >> (2 * side)
        low = (((packed & 15) | ((bits & 3) << 4)) - 32).to(tl.float32)
        high = (((packed >> 4) | (bits & 48)) - 32).to(tl.float32)
    elif KIND == "Q4_0":
        inside = mask & (unit * 2 + lane // 16 < COLUMNS // 32)
        packed = tl.load(base + (row * (COLUMNS // 32) + unit * 2) * 16 + lane, inside, 0).to(
            tl.int32
        )
        low, high = ((packed & 15) - 8).to(tl.float32), ((packed >> 4) - 8).to(tl.float32)
    elif KIND == "Q8_0":
        start = base.to(tl.pointer_type(tl.int8), bitcast=True) + row * COLUMNS + unit * 64 + lane
        low = tl.load(start, mask, 0).to(tl.float32)
        high = tl.load(start + 32, mask & (unit * 64 + 32 < COLUMNS), 0).to(tl.float32)
    else:
        if KIND == "BF16":
            # A bfloat16 is the upper half of a float32.
            words = (
                base.to(tl.pointer_type(tl.uint16), bitcast=True) + row * COLUMNS + unit * 64 + lane
            )
            first = tl.load(words, mask, 0)
            second = tl.load(words + 32, mask & (unit * 64 + 32 < COLUMNS), 0)
            low = (first.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
            high = (second.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            halves = (
                base.to(tl.pointer_type(tl.float16), bitcast=True)
                + row * COLUMNS
                + unit * 64
                + lane
            )
            low = tl.load(halves, mask, 0.0).to(tl.float32)
            high = tl.load(halves + 32, mask & (unit * 64 + 32 < COLUMNS), 0.0).to(tl.float32)
    return low, high


@triton.jit
def k_scales(KIND: tl.constexpr, base, row, unit, mask, COLUMNS: tl.constexpr):
    """(low scale, high scale, low minimum, high minimum) of Q4_K and Q5_K units; one value for each
    row and unit.

    The eight 6-bit scales and minima lie in 12 bytes; sub-blocks 2c and 2c + 1 of chunk c are
    neighbours, so a 16-bit word holds both.
    """
    size: tl.constexpr = 144 if KIND == "Q4_K" else 176
    block = base + (row * (COLUMNS // 256) + unit // 4) * size
    scale = tl.load(block.to(tl.pointer_type(tl.float16), bitcast=True), mask, 0.0).to(tl.float32)
    least = tl.load(block.to(tl.pointer_type(tl.float16), bitcast=True) + 1, mask, 0.0).to(
        tl.float32
    )
    words = block.to(tl.pointer_type(tl.uint16), bitcast=True) + 2 + unit % 2
    first = tl.load(words, mask, 0).to(tl.int32)
    second = tl.load(words + 2, mask, 0).to(tl.int32)
    third = tl.load(words + 4, mask, 0).to(tl.int32)
    upper = unit % 4 >= 2
    scales = tl.where(upper, (third & 0x0F0F) | ((first >> 2) & 0x3030), first & 0x3F3F)
    leasts = tl.where(upper, ((third >> 4) & 0x0F0F) | ((second >> 2) & 0x3030), second & 0x3F3F)
    return (
        scale * (scales & 63).to(tl.float32),
        scale * (scales >> 8).to(tl.float32),
        least * (leasts & 63).to(tl.float32),
        least * (leasts >> 8).to(tl.float32),
    )


@triton.jit
def pair_scales(base, row, unit, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(low scale, high scale) of Q8_0 units; one value for each row and unit."""
    halves = (base + ROWS * COLUMNS).to(tl.pointer_type(tl.float16), bitcast=True)
    place = halves + row * (COLUMNS // 32) + unit * 2
    low = tl.load(place, mask, 0.0).to(tl.float32)
    high = tl.load(place + 1, mask & (unit * 64 + 32 < COLUMNS), 0.0).to(tl.float32)
    return low, high


@triton.jit
def half_scales(
    KIND: tl.constexpr, base, row, unit, half, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """(low scale, high scale) of Q4_0 and Q6_K; one value for each 16 lanes (`half` is 0 or 1)."""
    if KIND == "Q4_0":
        halves = (base + ROWS * COLUMNS // 2).to(tl.pointer_type(tl.float16), bitcast=True)
        inside = mask & (unit * 2 + half < COLUMNS // 32)
        low = tl.load(halves + row * (COLUMNS // 32) + unit * 2 + half, inside, 0.0).to(tl.float32)
        high = low
    else:
        blocks: tl.constexpr = ROWS * COLUMNS // 256
        block = row * (COLUMNS // 256) + unit // 4 + half * 0
        scales = (base + blocks * 208).to(tl.pointer_type(tl.float16), bitcast=True)
        scale = tl.load(scales + block, mask, 0.0).to(tl.float32)
        place = (base + blocks * 192).to(tl.pointer_type(tl.int8), bitcast=True) + block * 16
        place += ((unit % 4) // 2) * 8 + (unit % 2) * 2 + half
        low = scale * tl.load(place, mask, 0).to(tl.float32)
        high = scale * tl.load(place + 4, mask, 0).to(tl.float32)
    return low, high
