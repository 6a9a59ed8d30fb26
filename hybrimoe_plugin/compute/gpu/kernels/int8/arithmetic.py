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


LOOK_UP = tl.constexpr("""{
    .reg .b32 code, side, first, last;
    and.b32 code, $2, 0x77777777;
    shr.u32 side, $2, 1;
    lop3.b32 side, side, 0x44444444, 0x32103210, 0xea;
    prmt.b32 first, $3, $4, code;
    prmt.b32 last, $5, $6, code;
    prmt.b32 $0, first, last, side;
    shr.u32 code, code, 16;
    shr.u32 side, side, 16;
    prmt.b32 first, $3, $4, code;
    prmt.b32 last, $5, $6, code;
    prmt.b32 $1, first, last, side;
}""")
"""Turns eight codes of 4 bits into points: two words of four in the order of the codes.

`prmt` picks four of eight bytes by the lower three bits of four selectors. So it runs once on the
first eight points and once on the others, and the codes' upper bits choose between both. The output
$1 is written last, when no input is wanted any more; $0 is kept apart from them (`=&r`).
"""


@triton.jit
def look_up(KIND: tl.constexpr, packed, points, ASM: tl.constexpr):
    """Two uint32 words of the int8 points for which the nibbles of four bytes stand.

    Their order is that of `interleaved`. `points` are the type's sixteen in four uint32 words; the
    twin has them as constants.
    """
    if ASM:
        first, second = tl.inline_asm_elementwise(
            LOOK_UP,
            "=&r,=&r,r,r,r,r,r",
            [packed, points[0], points[1], points[2], points[3]],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        first = point_words(KIND, packed)
        second = point_words(KIND, packed >> 16)
    return first, second


@triton.jit
def point_words(KIND: tl.constexpr, packed):
    """uint32 words of the points of each word's four lowest nibbles."""
    tl.static_assert(len(fact(KIND, "int8_points")) == 16)
    lower: tl.constexpr = points_word(KIND, False)
    upper: tl.constexpr = points_word(KIND, True)
    found = packed & 0
    for at in tl.static_range(4):
        code = (packed >> (4 * at)) & 15
        words = tl.where(code >= 8, tl.full([], upper, tl.uint64), tl.full([], lower, tl.uint64))
        byte = (words >> ((code & 7) * 8).to(tl.uint64)).to(tl.uint32) & 255
        found |= byte << (8 * at)
    return found


INTERLEAVE = tl.constexpr("prmt.b32 $0, $2, $3, 0x5140; prmt.b32 $1, $2, $3, 0x7362;")


@triton.jit
def interleaved(low, high, ASM: tl.constexpr):
    """Two uint32 words: the bytes of `low` and `high` by turns, from the lowest."""
    if ASM:
        first, second = tl.inline_asm_elementwise(
            INTERLEAVE,
            "=&r,=&r,r,r",
            [low, high],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        first = interleaved_bytes(low, high)
        second = interleaved_bytes(low >> 16, high >> 16)
    return first, second


@triton.jit
def interleaved_bytes(low, high):
    """The two lowest bytes of both by turns."""
    first = (low & 255) | ((high & 255) << 8)
    second = ((low >> 8) & 255) | (((high >> 8) & 255) << 8)
    return first | (second << 16)
