"""Scales, minima and zero points of units as the int8 kernels want them: small integers apart.

A unit's two *groups* are the 32 columns that share a scale of the activations. What a type scales
more finely is multiplied as integers, so a group ends as one integer, with one float each for it.
"""

# Triton's idiom: constants in capitals, arguments without Python types. Kernels stay dense: their
# operations and the order of these are what is compiled and compared bit for bit.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.formats.fields import field
from hybrimoe_plugin.compute.gpu.kernels.int8.arithmetic import signed_byte, unsigned_byte
from hybrimoe_plugin.compute.gpu.kernels.int8.words import four_words, split_words


@triton.jit
def one_word(
    KIND: tl.constexpr,
    NAME: tl.constexpr,
    TYPE: tl.constexpr,
    base,
    block,
    at,
    live,
    VALUES: tl.constexpr,
):
    """[N, U] uint32: word `at` of a field of each block."""
    place = field(KIND, NAME, TYPE, base, block, VALUES) + at
    return tl.load(place, tl.broadcast_to(live, place.shape)).to(tl.uint32)


@triton.jit
def half_of(word, AT: tl.constexpr):
    """float32: the float16 in the lower (AT 0) or upper half (1) of each word."""
    return (word >> (16 * AT)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def power_of(byte):
    """float32: 2^(byte - 128), MXFP4's scale for codes read twice as large.

    Those above 2^113, which no model has, give infinity, as in the float kernels.
    """
    bits = tl.minimum(byte + 14, 255) << 23
    return bits.to(tl.float32, bitcast=True) * (2.0**-15)


@triton.jit
def two_floats(
    KIND: tl.constexpr,
    NAME: tl.constexpr,
    base,
    row,
    unit,
    live,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A field of a unit's two blocks of 32 values, as float32 [N, U]."""
    values: tl.constexpr = ROWS * COLUMNS
    exponents: tl.constexpr = NAME == "exponent"
    small: tl.constexpr = tl.uint8 if exponents else tl.uint16
    bits: tl.constexpr = 8 if exponents else 16
    block = row * (COLUMNS // 32) + unit * 2
    if COLUMNS % 64 == 0:
        # Two fields are one aligned word: every plane has an even number of them.
        both: tl.constexpr = tl.uint16 if exponents else tl.uint32
        place = field(KIND, NAME, small, base, block, values)
        place = place.to(tl.pointer_type(both), bitcast=True)
        word = tl.load(place, tl.broadcast_to(live, place.shape)).to(tl.uint32)
        first = word & ((1 << bits) - 1)
        second = word >> bits
    else:
        first = one_word(KIND, NAME, small, base, block, 0, live, values)
        place = field(KIND, NAME, small, base, block + 1, values)
        inside = tl.broadcast_to(live & (unit * 64 + 32 < COLUMNS), place.shape)
        second = tl.load(place, inside, 0).to(tl.uint32)
    if exponents:
        return power_of(first), power_of(second)
    else:
        return half_of(first, 0), half_of(second, 0)


@triton.jit
def k_header(KIND: tl.constexpr, base, row, unit, live, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(d, dmin) float32 and (low scale, high scale, low minimum, high minimum) int32.

    Of Q4_K and Q5_K units, whose blocks begin with 16 bytes of them (see `formats.scales`).
    """
    block = row * (COLUMNS // 256) + unit // 4
    place = field(KIND, "d", tl.uint32, base, block, ROWS * COLUMNS)
    floats, first, second, third = split_words(four_words(place, live))
    shift = (16 * (unit % 2)).to(tl.uint32)
    first = first >> shift
    second = second >> shift
    third = third >> shift
    upper = unit % 4 >= 2
    scales = tl.where(upper, (third & 0x0F0F) | ((first >> 2) & 0x3030), first & 0x3F3F)
    minima = tl.where(upper, ((third >> 4) & 0x0F0F) | ((second >> 2) & 0x3030), second & 0x3F3F)
    return (
        half_of(floats, 0),
        half_of(floats, 1),
        unsigned_byte(scales, 0),
        unsigned_byte(scales, 1),
        unsigned_byte(minima, 0),
        unsigned_byte(minima, 1),
    )


@triton.jit
def quarter_scales(
    KIND: tl.constexpr, base, row, unit, live, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """int32 scales of the four quarters: low and high of the first 16 lanes, then of the others.

    Then the same for minima, where there are any. What belongs to all of a block's units is read
    whole by each of them: threads that read neighbouring words are given four of them each by
    Triton, which then exchanges them through shared memory.
    """
    values: tl.constexpr = ROWS * COLUMNS
    block = row * (COLUMNS // 256) + unit // 4
    if KIND == "Q6_K":
        at = ((unit % 4) // 2) * 4 + unit % 2
        low = one_word(KIND, "scales", tl.uint16, base, block, at, live, values)
        high = one_word(KIND, "scales", tl.uint16, base, block, at + 2, live, values)
        found = signed_byte(low, 0), signed_byte(high, 0), signed_byte(low, 1), signed_byte(high, 1)
        return found, found
    elif KIND == "Q2_K":
        place = field(KIND, "scales", tl.uint32, base, block, values)
        first, second, third, fourth = split_words(four_words(place, live))
        early = tl.where(unit % 2 == 0, first, second)
        late = tl.where(unit % 2 == 0, third, fourth)
        word = tl.where(unit % 4 < 2, early, late)
        return four_bytes(word & 0x0F0F0F0F), four_bytes((word >> 4) & 0x0F0F0F0F)
    else:
        tl.static_assert(KIND == "Q3_K")
        # Scale s has its lower four bits in byte s % 8, its upper two in byte s % 4.
        place = field(KIND, "scales_lower", tl.uint64, base, block, values)
        lower = tl.load(place, tl.broadcast_to(live, place.shape))
        lower = (lower >> (32 * (unit % 2)).to(tl.uint64)).to(tl.uint32)
        upper = one_word(KIND, "scales_upper", tl.uint32, base, block, 0, live, values)
        lower = (lower >> (4 * ((unit % 4) // 2)).to(tl.uint32)) & 0x0F0F0F0F
        upper = ((upper >> (2 * (unit % 4)).to(tl.uint32)) & 0x03030303) << 4
        # Each byte less 32; the set upper bits keep bytes from borrowing.
        packed = (((lower | upper) | 0x80808080) - 0x20202020) ^ 0x80808080
        found = (
            signed_byte(packed, 0),
            signed_byte(packed, 2),
            signed_byte(packed, 1),
            signed_byte(packed, 3),
        )
        return found, found


@triton.jit
def four_bytes(word):
    """int32 bytes of each word in the order of `quarter_scales`."""
    return (
        unsigned_byte(word, 0),
        unsigned_byte(word, 2),
        unsigned_byte(word, 1),
        unsigned_byte(word, 3),
    )


@triton.jit
def group_scales(
    KIND: tl.constexpr, base, row, unit, live, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """int32 scales of IQ4_XS's two groups of 32 columns."""
    tl.static_assert(KIND == "IQ4_XS")
    values: tl.constexpr = ROWS * COLUMNS
    block = row * (COLUMNS // 256) + unit // 4
    lower = one_word(KIND, "scales_lower", tl.uint32, base, block, 0, live, values)
    lower = (lower >> (8 * (unit % 4)).to(tl.uint32)) & 255
    upper = one_word(KIND, "scales_upper", tl.uint16, base, block, 0, live, values)
    upper = upper >> (4 * (unit % 4)).to(tl.uint32)
    first = ((lower & 15) | ((upper & 3) << 4)).to(tl.int32) - 32
    second = ((lower >> 4) | ((upper & 12) << 2)).to(tl.int32) - 32
    return first, second


@triton.jit
def block_float(
    KIND: tl.constexpr,
    NAME: tl.constexpr,
    base,
    row,
    unit,
    live,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[N, U] float32: a float16 field of blocks of 256 values."""
    block = row * (COLUMNS // 256) + unit // 4
    word = one_word(KIND, NAME, tl.uint16, base, block, 0, live, ROWS * COLUMNS)
    return half_of(word, 0)
