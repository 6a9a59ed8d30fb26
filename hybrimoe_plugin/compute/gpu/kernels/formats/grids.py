"""GGML blocks inside Triton kernels: codes that stand for entries of a grid in memory.

An entry is four or eight values, so 32 columns have eight or four codes. Signs, where there are
any, come in bytes for eight columns. A code is loaded once for its entry, and an entry in one load.
A unit's low and high columns are two groups of 32 (`Format.step` is 32).
"""

# Triton's idiom: constants in capitals, arguments without Python types.
# Kernels stay dense: their operations and the order of these are what is compiled and compared bit
# for bit.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.formats.facts import fact, grid_start
from hybrimoe_plugin.compute.gpu.kernels.formats.fields import field


@triton.jit
def loaded(
    KIND: tl.constexpr,
    NAME: tl.constexpr,
    TYPE: tl.constexpr,
    base,
    block,
    at,
    mask,
    VALUES: tl.constexpr,
):
    """Words `at` of a field as int32; no bit of a smaller word is lost, and no sign is made."""
    return tl.load(field(KIND, NAME, TYPE, base, block, VALUES) + at, mask, 0).to(tl.int32)


@triton.jit
def grid_codes(KIND: tl.constexpr, base, block, group, mask, VALUES: tl.constexpr):
    """[..., entries of 32 columns] int32: which entries of the grid."""
    entry = tl.arange(0, 32 // fact(KIND, "entry_values"))
    first = group * (32 // fact(KIND, "entry_values"))
    if KIND == "IQ2_XXS":
        code = loaded(KIND, "parts", tl.uint8, base, block, group * 8 + entry, mask, VALUES)
    elif KIND == "IQ2_XS":
        code = loaded(KIND, "codes", tl.uint16, base, block, first + entry, mask, VALUES) & 511
    else:
        code = loaded(KIND, "codes", tl.uint8, base, block, first + entry, mask, VALUES)
    # What a byte has no room for.
    if KIND == "IQ2_S":
        upper = loaded(KIND, "code_bits", tl.uint8, base, block, group, mask, VALUES)
        code |= ((upper >> (2 * entry)) & 3) << 8
    elif KIND == "IQ3_S":
        upper = loaded(KIND, "code_bits", tl.uint8, base, block, group, mask, VALUES)
        code |= ((upper >> entry) & 1) << 8
    elif KIND == "IQ1_S":
        upper = loaded(KIND, "words", tl.uint16, base, block, group, mask, VALUES)
        code |= ((upper >> (3 * entry)) & 7) << 8
    elif KIND == "IQ1_M":
        at = group * 2 + entry // 2
        upper = loaded(KIND, "code_bits", tl.uint8, base, block, at, mask, VALUES)
        code |= ((upper >> (4 * (entry % 2))) & 7) << 8
    return code


@triton.jit
def sign_bytes(KIND: tl.constexpr, base, block, group, mask, VALUES: tl.constexpr):
    """[..., 4] int32: a set bit for each minus of eight columns."""
    eight = tl.arange(0, 4)
    if KIND == "IQ2_S" or KIND == "IQ3_S":
        minus = loaded(KIND, "signs", tl.uint8, base, block, group * 4 + eight, mask, VALUES)
    else:
        if KIND == "IQ2_XS":
            at = group * 4 + eight
            minus = loaded(KIND, "codes", tl.uint16, base, block, at, mask, VALUES) >> 9
        else:
            minus = (signs_and_scale(KIND, base, block, group, mask, VALUES) >> (7 * eight)) & 127
        # The number of minuses is even, which gives the eighth.
        parity = minus ^ (minus >> 4)
        parity ^= parity >> 2
        minus |= ((parity ^ (parity >> 1)) & 1) << 7
    return minus


@triton.jit
def signs_and_scale(KIND: tl.constexpr, base, block, group, mask, VALUES: tl.constexpr):
    """int32: four times seven signs of a group of 32 columns, and four bits of scale on top."""
    if KIND == "IQ2_XXS":
        word = loaded(KIND, "parts", tl.int32, base, block, group * 2 + 1, mask, VALUES)
    else:
        word = loaded(KIND, "words", tl.int32, base, block, group, mask, VALUES)
    return word


@triton.jit
def ones_steps(KIND: tl.constexpr, base, block, group, mask, VALUES: tl.constexpr):
    """[..., 4] float32: what is added to the values of IQ1 grids, an eighth or minus an eighth."""
    eight = tl.arange(0, 4)
    if KIND == "IQ1_S":
        side = loaded(KIND, "words", tl.uint16, base, block, group, mask, VALUES) >> 15
    else:
        at = group * 2 + eight // 2
        side = loaded(KIND, "code_bits", tl.uint8, base, block, at, mask, VALUES)
        side = (side >> (4 * (eight % 2) + 3)) & 1
    return tl.where(side == 0, 0.125, -0.125)


@triton.jit
def grid_group(KIND: tl.constexpr, base, tables, block, group, mask, VALUES: tl.constexpr):
    """[..., 32] float32: the values of one group of 32 columns, before scales."""
    width: tl.constexpr = fact(KIND, "entry_values")
    code = grid_codes(KIND, base, block, group, mask, VALUES)
    start: tl.constexpr = grid_start(KIND)
    entries = tables.to(tl.pointer_type(tl.int8), bitcast=True) + start
    inside = tl.expand_dims(mask & (code >= 0), -1)
    values = tl.load(entries + tl.expand_dims(code * width, -1) + tl.arange(0, width), inside, 0)
    eights: tl.constexpr = code.shape[:-1] + [4, 8]  # noqa: RUF005 - Triton unpacks none
    values = tl.reshape(values, eights).to(tl.float32)
    if KIND == "IQ1_S" or KIND == "IQ1_M":
        steps = ones_steps(KIND, base, block, group, mask, VALUES)
        values += tl.expand_dims(steps, -1)
    else:
        minus = sign_bytes(KIND, base, block, group, mask, VALUES)
        bits = (tl.expand_dims(minus, -1) >> tl.arange(0, 8)) & 1
        values = tl.where(bits == 0, values, -values)
    return tl.reshape(values, code.shape[:-1] + [32])  # noqa: RUF005


@triton.jit
def grid_values(
    KIND: tl.constexpr, base, tables, row, unit, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """(low, high) float32 of each lane."""
    block = row * (COLUMNS // 256) + unit // 4
    group = (unit % 4) * 2
    low = grid_group(KIND, base, tables, block, group, mask, ROWS * COLUMNS)
    high = grid_group(KIND, base, tables, block, group + 1, mask, ROWS * COLUMNS)
    return low, high


@triton.jit
def grid_scale(KIND: tl.constexpr, base, block, group, half, mask, VALUES: tl.constexpr):
    """float32: the scale of 16 columns, `half` 0 or 1 of a group, before d."""
    if KIND == "IQ2_XXS" or KIND == "IQ3_XXS":
        word = signs_and_scale(KIND, base, block, group + half * 0, mask, VALUES)
        small = (word >> 28) & 15
    elif KIND == "IQ3_S":
        small = loaded(KIND, "scales", tl.uint8, base, block, group // 2 + half * 0, mask, VALUES)
        small = (small >> (4 * (group % 2))) & 15
    elif KIND == "IQ1_S":
        small = loaded(KIND, "words", tl.uint16, base, block, group + half * 0, mask, VALUES)
        small = (small >> 12) & 7
    elif KIND == "IQ1_M":
        small = loaded(KIND, "scales", tl.uint16, base, block, group // 2 + half * 0, mask, VALUES)
        small = (small >> (6 * (group % 2) + 3 * half)) & 7
    else:
        small = loaded(KIND, "scales", tl.uint8, base, block, group + half * 0, mask, VALUES)
        small = (small >> (4 * half)) & 15
    if KIND == "IQ2_XXS" or KIND == "IQ2_XS" or KIND == "IQ2_S":
        scale = small.to(tl.float32) * 0.25 + 0.125
    elif KIND == "IQ3_XXS":
        scale = small.to(tl.float32) * 0.5 + 0.25
    else:
        scale = (2 * small + 1).to(tl.float32)
    return scale


@triton.jit
def spread_d(KIND: tl.constexpr, base, block, mask, VALUES: tl.constexpr):
    """IQ1_M's d, float32: its float16 lies in the upper four bits of the scales' four words."""
    bits = (loaded(KIND, "scales", tl.uint16, base, block, 0, mask, VALUES) >> 12) & 15
    bits |= (loaded(KIND, "scales", tl.uint16, base, block, 1, mask, VALUES) >> 8) & 0xF0
    bits |= (loaded(KIND, "scales", tl.uint16, base, block, 2, mask, VALUES) >> 4) & 0xF00
    bits |= loaded(KIND, "scales", tl.uint16, base, block, 3, mask, VALUES) & 0xF000
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
