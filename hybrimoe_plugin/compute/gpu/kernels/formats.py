"""GGML blocks inside Triton kernels: codes and scales of units of 64 columns.

Every type is read as `w = scale * code - minimum`. A unit holds 32 lanes, and each lane a *low* and
a *high* column, so that all types share one loop:

    Q4_K, Q5_K, Q8_0, BF16, F16   lane i: columns i and 32 + i of the unit
    Q4_0                          lane i < 16: columns i and 16 + i, the others 32 further
    Q6_K                          two units share 128 columns: lane i of unit u has columns
                                  32 u + i and 64 + 32 u + i of them (u = 0 or 1)

In the types with nibbles these are the low and the high nibble of one byte. Row, unit and lane
arrive as tensors that broadcast against each other: [N, 1, 1], [1, U, 1], [1, 1, 32] in the decode
kernels, [N, 1], a number, [1, 32] in the prefill kernels.

Formats: https://github.com/ggml-org/ggml, src/ggml-common.h, as in `weights.dequant`; planes:
`layout.PLANES`.
"""

# Triton's idiom: constants in capitals, arguments without Python types.
# Kernels stay dense: their operations and the order of these are what is compiled and compared bit
# for bit.
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
def q4_k_codes(base, row, unit, lane, mask, COLUMNS: tl.constexpr):
    """Blocks of 144 bytes: d 2 | dmin 2 | scales 12 | 4 chunks of 32 bytes, one for each unit."""
    block = row * (COLUMNS // 256) + unit // 4
    packed = tl.load(base + block * 144 + 16 + (unit % 4) * 32 + lane, mask, 0)
    low = (packed & 15).to(tl.float32)
    high = (packed >> 4).to(tl.float32)
    return low, high


@triton.jit
def q5_k_codes(base, row, unit, lane, mask, COLUMNS: tl.constexpr):
    """Blocks of 176 bytes: as Q4_K, with 32 bytes of fifth bits before the chunks.

    Bits 2c and 2c + 1 of byte i are those of lane i's low and high code in chunk c.
    """
    block = base + (row * (COLUMNS // 256) + unit // 4) * 176
    chunk = unit % 4
    packed = tl.load(block + 48 + chunk * 32 + lane, mask, 0).to(tl.int32)
    bits = tl.load(block + 16 + lane, mask, 0).to(tl.int32) >> (2 * chunk)
    low = ((packed & 15) | ((bits & 1) << 4)).to(tl.float32)
    high = ((packed >> 4) | ((bits & 2) << 3)).to(tl.float32)
    return low, high


@triton.jit
def q6_k_codes(base, row, unit, lane, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Planes: 128 bytes of nibbles of each block, 64 bytes of upper bit pairs, scales, d.

    Of the four bit pairs in byte i of a half's 32, pair s is lane i's low one in unit s of that
    half, and pair s + 2 its high one.
    """
    blocks: tl.constexpr = ROWS * COLUMNS // 256
    block = row * (COLUMNS // 256) + unit // 4
    half = (unit % 4) // 2
    side = unit % 2
    packed = tl.load(base + block * 128 + (unit % 4) * 32 + lane, mask, 0).to(tl.int32)
    pairs = tl.load(base + blocks * 128 + block * 64 + half * 32 + lane, mask, 0)
    bits = pairs.to(tl.int32) >> (2 * side)
    low = (((packed & 15) | ((bits & 3) << 4)) - 32).to(tl.float32)
    high = (((packed >> 4) | (bits & 48)) - 32).to(tl.float32)
    return low, high


@triton.jit
def q4_0_codes(base, row, unit, lane, mask, COLUMNS: tl.constexpr):
    """Planes: 16 bytes of nibbles of each block, two blocks in a unit; then d."""
    inside = mask & (unit * 2 + lane // 16 < COLUMNS // 32)
    block = row * (COLUMNS // 32) + unit * 2
    packed = tl.load(base + block * 16 + lane, inside, 0).to(tl.int32)
    low = ((packed & 15) - 8).to(tl.float32)
    high = ((packed >> 4) - 8).to(tl.float32)
    return low, high


@triton.jit
def q8_0_codes(base, row, unit, lane, mask, COLUMNS: tl.constexpr):
    """Planes: 32 int8 codes of each block, so the codes of a row lie in order; then d."""
    start = base.to(tl.pointer_type(tl.int8), bitcast=True) + row * COLUMNS + unit * 64 + lane
    low = tl.load(start, mask, 0).to(tl.float32)
    high = tl.load(start + 32, mask & (unit * 64 + 32 < COLUMNS), 0).to(tl.float32)
    return low, high


@triton.jit
def bf16_values(base, row, unit, lane, mask, COLUMNS: tl.constexpr):
    """A bfloat16 is the upper half of a float32."""
    words = base.to(tl.pointer_type(tl.uint16), bitcast=True) + row * COLUMNS + unit * 64 + lane
    first = tl.load(words, mask, 0)
    second = tl.load(words + 32, mask & (unit * 64 + 32 < COLUMNS), 0)
    low = (first.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    high = (second.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def f16_values(base, row, unit, lane, mask, COLUMNS: tl.constexpr):
    """Values as they are."""
    halves = base.to(tl.pointer_type(tl.float16), bitcast=True) + row * COLUMNS + unit * 64 + lane
    low = tl.load(halves, mask, 0.0).to(tl.float32)
    high = tl.load(halves + 32, mask & (unit * 64 + 32 < COLUMNS), 0.0).to(tl.float32)
    return low, high


@triton.jit
def codes(
    KIND: tl.constexpr, base, row, unit, lane, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """(low, high) float32 codes of each lane; `mask` hides rows and units beyond the matrix."""
    if KIND == "Q4_K":
        low, high = q4_k_codes(base, row, unit, lane, mask, COLUMNS)
    elif KIND == "Q5_K":
        low, high = q5_k_codes(base, row, unit, lane, mask, COLUMNS)
    elif KIND == "Q6_K":
        low, high = q6_k_codes(base, row, unit, lane, mask, ROWS, COLUMNS)
    elif KIND == "Q4_0":
        low, high = q4_0_codes(base, row, unit, lane, mask, COLUMNS)
    elif KIND == "Q8_0":
        low, high = q8_0_codes(base, row, unit, lane, mask, COLUMNS)
    else:
        if KIND == "BF16":
            low, high = bf16_values(base, row, unit, lane, mask, COLUMNS)
        else:
            low, high = f16_values(base, row, unit, lane, mask, COLUMNS)
    return low, high


@triton.jit
def k_scales(KIND: tl.constexpr, base, row, unit, mask, COLUMNS: tl.constexpr):
    """(low scale, high scale, low minimum, high minimum) of Q4_K and Q5_K units.

    One value for each row and unit. The eight 6-bit scales and minima lie in 12 bytes; sub-blocks
    2c and 2c + 1 of chunk c are neighbours, so a 16-bit word holds both.
    """
    size: tl.constexpr = 144 if KIND == "Q4_K" else 176
    block = base + (row * (COLUMNS // 256) + unit // 4) * size
    d = block.to(tl.pointer_type(tl.float16), bitcast=True)
    scale = tl.load(d, mask, 0.0).to(tl.float32)
    dmin = block.to(tl.pointer_type(tl.float16), bitcast=True) + 1
    least = tl.load(dmin, mask, 0.0).to(tl.float32)
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
        place = halves + row * (COLUMNS // 32) + unit * 2 + half
        low = tl.load(place, inside, 0.0).to(tl.float32)
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
