"""GGML blocks inside Triton kernels: the codes of units of 64 columns.

Every type is read as `w = scale * code - minimum`. A unit holds 32 lanes, and each lane a *low* and
a *high* column, so that all types share one loop. Where they are follows from the type's `step`:

    32    lane i: columns i and 32 + i of the unit
    16    lane i < 16: columns i and 16 + i, the others 32 further (types with nibbles in blocks of
          16 bytes)
    64    two units share 128 columns: lane i of unit u has columns 32 u + i and 64 + 32 u + i of
          them (u = 0 or 1; Q6_K)

In the types with nibbles these are the low and the high nibble of one byte, and a unit has 32 bytes
of them. Row, unit and lane arrive as tensors that broadcast against each other: [N, 1, 1],
[1, U, 1], [1, 1, 32] in the decode kernels, [N, 1], a number, [1, 32] in the prefill kernels.
"""

# Triton's idiom: constants in capitals, arguments without Python types.
# Kernels stay dense: their operations and the order of these are what is compiled and compared bit
# for bit.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.formats.facts import fact, points_word
from hybrimoe_plugin.compute.gpu.kernels.formats.fields import field
from hybrimoe_plugin.compute.gpu.kernels.formats.grids import grid_values


@triton.jit
def low_columns(KIND: tl.constexpr, unit, lane):
    """The column of each lane's low half."""
    if fact(KIND, "step") == 64:
        column = (unit // 2) * 128 + (unit % 2) * 32 + lane
    elif fact(KIND, "step") == 16:
        column = unit * 64 + (lane // 16) * 32 + lane % 16
    else:
        column = unit * 64 + lane
    return column


@triton.jit
def moved(packed, MASK: tl.constexpr, AT: tl.constexpr, TO: tl.constexpr):
    """The bits of MASK that lie AT bits up, TO bits up."""
    if TO >= AT:  # noqa: SIM108 - as a choice of constants, not of tensors
        bits = (packed & (MASK << AT)) << (TO - AT)
    else:
        bits = (packed >> (AT - TO)) & (MASK << TO)
    return bits


@triton.jit
def nibbles(
    KIND: tl.constexpr, base, row, unit, lane, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """(low, high) nibbles of each lane's byte."""
    if fact(KIND, "values") == 32:
        # Two blocks make a unit: their bytes are neighbours, and the second one may be missing.
        block = row * (COLUMNS // 32) + unit * 2
        inside = mask & (unit * 2 + lane // 16 < COLUMNS // 32)
        packed = tl.load(
            field(KIND, "nibbles", tl.uint8, base, block, ROWS * COLUMNS) + lane, inside, 0
        )
    else:
        block = row * (COLUMNS // 256) + unit // 4
        place = field(KIND, "nibbles", tl.uint8, base, block, ROWS * COLUMNS)
        packed = tl.load(place + (unit % 4) * 32 + lane, mask, 0)
    packed = packed.to(tl.int32)
    return packed & 15, packed >> 4


@triton.jit
def bit_pairs(
    KIND: tl.constexpr,
    TO: tl.constexpr,
    base,
    row,
    unit,
    lane,
    mask,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(low, high) int32: two bits of each code, TO bits up.

    Byte i of 32 holds those of columns i, 32 + i, 64 + i and 96 + i of 128.
    """
    block = row * (COLUMNS // 256) + unit // 4
    half = (unit % 4) // 2
    side = unit % 2
    place = field(KIND, "pairs", tl.uint8, base, block, ROWS * COLUMNS)
    packed = tl.load(place + half * 32 + lane, mask, 0).to(tl.int32)
    if fact(KIND, "step") == 64:
        packed = packed >> (2 * side)
        high = moved(packed, 3, 4, TO)
    else:
        packed = packed >> (4 * side)
        high = moved(packed, 3, 2, TO)
    return moved(packed, 3, 0, TO), high


@triton.jit
def single_bits(
    KIND: tl.constexpr,
    TO: tl.constexpr,
    base,
    row,
    unit,
    lane,
    mask,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(low, high) int32: one bit of each code, TO bits up."""
    if fact(KIND, "values") == 32:
        # Bits i and 16 + i of a block's word are those of its lane i's low and high code. A word is
        # loaded once for all its lanes.
        half = tl.arange(0, 2)
        block = row * (COLUMNS // 32) + unit * 2 + half
        inside = mask & (unit * 2 + half < COLUMNS // 32)
        words = tl.load(field(KIND, "bits", tl.int32, base, block, ROWS * COLUMNS), inside, 0)
        spread = tl.expand_dims(words, -1) >> tl.arange(0, 16)
        bits = tl.reshape(spread, words.shape[:-1] + [32])  # noqa: RUF005 - Triton unpacks none
        high = moved(bits, 1, 16, TO)
    else:
        # Bits 2c and 2c + 1 of byte i are those of lane i's low and high code in unit c.
        block = row * (COLUMNS // 256) + unit // 4
        place = field(KIND, "bits", tl.uint8, base, block, ROWS * COLUMNS)
        bits = tl.load(place + lane, mask, 0).to(tl.int32) >> (2 * (unit % 4))
        high = moved(bits, 1, 1, TO)
    return moved(bits, 1, 0, TO), high


@triton.jit
def points(KIND: tl.constexpr, code):
    """The int8 values for which codes of 4 bits stand."""
    lower: tl.constexpr = points_word(KIND, False)
    upper: tl.constexpr = points_word(KIND, True)
    words = tl.where(code >= 8, tl.full([], upper, tl.uint64), tl.full([], lower, tl.uint64))
    return (words >> ((code & 7) * 8).to(tl.uint64)).to(tl.int8)


@triton.jit
def e2m1(code):
    """MXFP4's floats of 4 bits, times 2^-14: their bits in a float16's place."""
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def bytes_as_they_are(base, row, unit, lane, mask, COLUMNS: tl.constexpr):
    """(low, high) int8 codes, which lie in the order of the columns."""
    start = base.to(tl.pointer_type(tl.int8), bitcast=True) + row * COLUMNS + unit * 64 + lane
    low = tl.load(start, mask, 0)
    high = tl.load(start + 32, mask & (unit * 64 + 32 < COLUMNS), 0)
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
    low = tl.load(halves, mask, 0.0)
    high = tl.load(halves + 32, mask & (unit * 64 + 32 < COLUMNS), 0.0)
    return low, high


@triton.jit
def lower_bits(
    KIND: tl.constexpr, base, row, unit, lane, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """(low, high) of the field with the codes, or with the lower bits of them."""
    if fact(KIND, "code") == "nibbles":
        low, high = nibbles(KIND, base, row, unit, lane, mask, ROWS, COLUMNS)
    elif fact(KIND, "code") == "pairs":
        low, high = bit_pairs(KIND, 0, base, row, unit, lane, mask, ROWS, COLUMNS)
    elif fact(KIND, "code") == "bytes":
        low, high = bytes_as_they_are(base, row, unit, lane, mask, COLUMNS)
    elif KIND == "BF16":
        low, high = bf16_values(base, row, unit, lane, mask, COLUMNS)
    else:
        low, high = f16_values(base, row, unit, lane, mask, COLUMNS)
    return low, high


@triton.jit
def codes(
    KIND: tl.constexpr,
    base,
    tables,
    row,
    unit,
    lane,
    mask,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(low, high) float32 codes of each lane; `mask` hides rows and units beyond the matrix."""
    if fact(KIND, "code") == "grid":
        low, high = grid_values(KIND, base, tables, row, unit, mask, ROWS, COLUMNS)
    else:
        low, high = lower_bits(KIND, base, row, unit, lane, mask, ROWS, COLUMNS)
    if fact(KIND, "upper") != "":
        to: tl.constexpr = 4 if fact(KIND, "code") == "nibbles" else 2
        if fact(KIND, "upper") == "pairs":
            more_low, more_high = bit_pairs(KIND, to, base, row, unit, lane, mask, ROWS, COLUMNS)
        else:
            more_low, more_high = single_bits(KIND, to, base, row, unit, lane, mask, ROWS, COLUMNS)
        low |= more_low
        high |= more_high
    if fact(KIND, "zero") != 0:
        low -= fact(KIND, "zero")
        high -= fact(KIND, "zero")
    if fact(KIND, "e2m1"):
        low = e2m1(low)
        high = e2m1(high)
    elif fact(KIND, "points") != ():
        low = points(KIND, low)
        high = points(KIND, high)
    return low.to(tl.float32), high.to(tl.float32)
