"""GGML blocks inside Triton kernels: scales and minima of units of 64 columns (see `codes`)."""

# Triton's idiom: constants in capitals, arguments without Python types.
# Kernels stay dense: their operations and the order of these are what is compiled and compared bit
# for bit.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.formats.facts import fact
from hybrimoe_plugin.compute.gpu.kernels.formats.fields import field
from hybrimoe_plugin.compute.gpu.kernels.formats.grids import grid_scale, spread_d


@triton.jit
def half_precision(KIND: tl.constexpr, NAME: tl.constexpr, base, block, mask, VALUES: tl.constexpr):
    """A float16 field of each block, as float32."""
    place = field(KIND, NAME, tl.float16, base, block, VALUES)
    return tl.load(place, mask, 0.0).to(tl.float32)


@triton.jit
def k_scales(KIND: tl.constexpr, base, row, unit, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(low scale, high scale, low minimum, high minimum) of Q4_K and Q5_K units.

    One value for each row and unit. The eight 6-bit scales and minima lie in 12 bytes; sub-blocks
    2c and 2c + 1 of chunk c are neighbours, so a 16-bit word holds both.
    """
    block = row * (COLUMNS // 256) + unit // 4
    scale = half_precision(KIND, "d", base, block, mask, ROWS * COLUMNS)
    least = half_precision(KIND, "dmin", base, block, mask, ROWS * COLUMNS)
    words = field(KIND, "scales", tl.uint16, base, block, ROWS * COLUMNS) + unit % 2
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
def pair_scales(
    KIND: tl.constexpr, base, row, unit, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """(low scale, high scale) of Q8_0 units; one value for each row and unit."""
    block = row * (COLUMNS // 32) + unit * 2
    low = half_precision(KIND, "d", base, block, mask, ROWS * COLUMNS)
    inside = mask & (unit * 64 + 32 < COLUMNS)
    high = half_precision(KIND, "d", base, block + 1, inside, ROWS * COLUMNS)
    return low, high


@triton.jit
def power_of_two(KIND: tl.constexpr, base, block, mask, VALUES: tl.constexpr):
    """MXFP4's scales 2^(byte - 127), times 2^14 (see `codes.e2m1`).

    Those above 2^113, which no model has, give infinity.
    """
    byte = tl.load(field(KIND, "exponent", tl.uint8, base, block, VALUES), mask, 0).to(tl.int32)
    return (tl.minimum(byte + 14, 255) << 23).to(tl.float32, bitcast=True)


@triton.jit
def small_scales(KIND: tl.constexpr, base, unit, half, block, mask, VALUES: tl.constexpr):
    """(low scale, high scale) before d, float32, of types in blocks of 256 values."""
    if KIND == "IQ4_XS":
        # Six bits for each 32 columns: two in a word of 16, four in bytes. Low and high share them.
        lower = tl.load(
            field(KIND, "scales_lower", tl.uint8, base, block, VALUES) + unit % 4, mask, 0
        )
        place = field(KIND, "scales_upper", tl.uint16, base, block, VALUES)
        upper = (tl.load(place, mask, 0).to(tl.int32) >> (4 * (unit % 4) + 2 * half)) & 3
        low = (((lower.to(tl.int32) >> (4 * half)) & 15) | (upper << 4)) - 32
        high = low
    elif KIND == "Q3_K":
        # Six bits for each 16: scale s has its lower four in byte s % 8, its upper in byte s % 4.
        place = field(KIND, "scales_lower", tl.uint8, base, block, VALUES) + (unit % 2) * 4 + half
        shift = 4 * ((unit % 4) // 2)
        low = (tl.load(place, mask, 0).to(tl.int32) >> shift) & 15
        high = (tl.load(place + 2, mask, 0).to(tl.int32) >> shift) & 15
        place = field(KIND, "scales_upper", tl.uint8, base, block, VALUES) + half
        shift = 2 * (unit % 4)
        low |= ((tl.load(place, mask, 0).to(tl.int32) >> shift) & 3) << 4
        high |= ((tl.load(place + 2, mask, 0).to(tl.int32) >> shift) & 3) << 4
        low -= 32
        high -= 32
    elif KIND == "Q2_K":
        place = field(KIND, "scales", tl.uint8, base, block, VALUES) + (unit % 4) * 4 + half
        low = tl.load(place, mask, 0) & 15
        high = tl.load(place + 2, mask, 0) & 15
    else:
        tl.static_assert(KIND == "Q6_K")
        place = field(KIND, "scales", tl.int8, base, block, VALUES)
        place += ((unit % 4) // 2) * 8 + (unit % 2) * 2 + half
        low = tl.load(place, mask, 0)
        high = tl.load(place + 4, mask, 0)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def half_scales(
    KIND: tl.constexpr, base, row, unit, half, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """(low scale, high scale), one value for each 16 lanes (`half` is 0 or 1)."""
    if fact(KIND, "values") == 32:
        block = row * (COLUMNS // 32) + unit * 2 + half
        inside = mask & (unit * 2 + half < COLUMNS // 32)
        if KIND == "MXFP4":
            low = power_of_two(KIND, base, block, inside, ROWS * COLUMNS)
        else:
            low = half_precision(KIND, "d", base, block, inside, ROWS * COLUMNS)
        high = low
    else:
        block = row * (COLUMNS // 256) + unit // 4 + half * 0
        if KIND == "IQ1_M":
            scale = spread_d(KIND, base, block, mask, ROWS * COLUMNS)
        else:
            scale = half_precision(KIND, "d", base, block, mask, ROWS * COLUMNS)
        if fact(KIND, "code") == "grid":
            group = (unit % 4) * 2
            low = grid_scale(KIND, base, block, group, half, mask, ROWS * COLUMNS)
            high = grid_scale(KIND, base, block, group + 1, half, mask, ROWS * COLUMNS)
        else:
            low, high = small_scales(KIND, base, unit, half, block, mask, ROWS * COLUMNS)
        low *= scale
        high *= scale
    return low, high


@triton.jit
def half_minima(
    KIND: tl.constexpr, base, row, unit, half, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """(low minimum, high minimum), one value for each 16 lanes (`half` is 0 or 1)."""
    if fact(KIND, "values") == 32:
        block = row * (COLUMNS // 32) + unit * 2 + half
        inside = mask & (unit * 2 + half < COLUMNS // 32)
        low = -half_precision(KIND, "m", base, block, inside, ROWS * COLUMNS)
        high = low
    else:
        tl.static_assert(KIND == "Q2_K")
        block = row * (COLUMNS // 256) + unit // 4 + half * 0
        least = half_precision(KIND, "dmin", base, block, mask, ROWS * COLUMNS)
        place = field(KIND, "scales", tl.uint8, base, block, ROWS * COLUMNS) + (unit % 4) * 4 + half
        low = least * (tl.load(place, mask, 0) >> 4).to(tl.float32)
        high = least * (tl.load(place + 2, mask, 0) >> 4).to(tl.float32)
    return low, high
