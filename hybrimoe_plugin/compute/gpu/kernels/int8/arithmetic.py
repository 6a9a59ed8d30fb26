"""Integer operations on packed words, each as one machine instruction and as plain arithmetic.

ASM chooses: instructions of the device (`dp4a`, `prmt`), or the arithmetic twin, which Triton's
interpreter can run. Both give the same bits, since all of it is integers. A word holds the codes of
four neighbouring columns, the first in its lowest byte.
"""

# Triton's idiom: constants in capitals, arguments without Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.formats.facts import fact, points_word


@triton.jit
def signed_byte(words, AT: tl.constexpr):
    """int32: byte AT of each word with its sign."""
    return (words.to(tl.int32, bitcast=True) << (24 - 8 * AT)) >> 24


@triton.jit
def unsigned_byte(words, AT: tl.constexpr):
    """int32: byte AT of each word."""
    return ((words >> (8 * AT)) & 255).to(tl.int32)


@triton.jit
def dots_of_four(codes, values, total, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """int32: total + the dot products of four codes and four values.

    Args:
        codes: uint32 words of int8 if SIGNED, else of uint8.
        values: uint32 words of int8.
        total: int32.
    """
    if ASM:
        if SIGNED:
            total = tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, $2, $3;",
                "=r,r,r,r",
                [codes, values, total],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            total = tl.inline_asm_elementwise(
                "dp4a.u32.s32 $0, $1, $2, $3;",
                "=r,r,r,r",
                [codes, values, total],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
    else:
        for at in tl.static_range(4):
            if SIGNED:  # noqa: SIM108 - as a choice of constants, not of tensors
                code = signed_byte(codes, at)
            else:
                code = unsigned_byte(codes, at)
            total += code * signed_byte(values, at)
    return total


@triton.constexpr_function
def points_asm(kind):
    """PTX that turns eight codes of 4 bits into the type's points: (even ones, odd ones).

    `prmt` picks four of eight bytes by the lower three bits of four selectors. So it runs once on
    the first eight points and once on the others, and the codes' upper bits choose between both.
    """
    lower, upper = points_word(kind, False), points_word(kind, True)
    t0, t1 = lower & 0xFFFFFFFF, lower >> 32
    t2, t3 = upper & 0xFFFFFFFF, upper >> 32
    look_up = f"""
        prmt.b32 first, {t0:#x}, {t1:#x}, code;
        prmt.b32 last, {t2:#x}, {t3:#x}, code;
    """
    return f"""{{
        .reg .b32 code, side, first, last, early, late;
        and.b32 code, $2, 0x77777777;
        shr.u32 side, $2, 1;
        lop3.b32 side, side, 0x44444444, 0x32103210, 0xea;
        {look_up}
        prmt.b32 early, first, last, side;
        shr.u32 code, code, 16;
        shr.u32 side, side, 16;
        {look_up}
        prmt.b32 late, first, last, side;
        prmt.b32 $0, early, late, 0x6420;
        prmt.b32 $1, early, late, 0x7531;
    }}"""


@triton.jit
def look_up(KIND: tl.constexpr, packed, ASM: tl.constexpr):
    """(low, high): the int8 points for which the low and high nibbles of four bytes stand."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            points_asm(KIND),
            "=r,=r,r",
            [packed],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        low = point_words(KIND, packed & 0x0F0F0F0F)
        high = point_words(KIND, (packed >> 4) & 0x0F0F0F0F)
    return low, high


@triton.jit
def point_words(KIND: tl.constexpr, codes):
    """uint32 words of the points of four codes of 4 bits in a word's bytes."""
    tl.static_assert(len(fact(KIND, "int8_points")) == 16)
    lower: tl.constexpr = points_word(KIND, False)
    upper: tl.constexpr = points_word(KIND, True)
    found = codes & 0
    for at in tl.static_range(4):
        code = (codes >> (8 * at)) & 15
        words = tl.where(code >= 8, tl.full([], upper, tl.uint64), tl.full([], lower, tl.uint64))
        byte = (words >> ((code & 7) * 8).to(tl.uint64)).to(tl.uint32) & 255
        found |= byte << (8 * at)
    return found
