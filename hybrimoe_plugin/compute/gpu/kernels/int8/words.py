"""Codes of units of 64 columns as packed words, and their integer dot products.

A unit is one thread's: it reads the unit's codes in words of 16 bytes. Its columns come in four
*quarters* of 16, each with four words of codes: low and high codes (`formats.codes`) of the first
16 lanes, then of the others. Row and unit arrive as tensors [N, 1] and [1, U], words as [N, U, 4].
"""

# Triton's idiom: constants in capitals, arguments without Python types. Kernels stay dense: their
# operations and the order of these are what is compiled and compared bit for bit.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.formats.description import FORMATS
from hybrimoe_plugin.compute.gpu.kernels.formats.facts import DESCRIPTIONS, fact, points_start
from hybrimoe_plugin.compute.gpu.kernels.formats.fields import field
from hybrimoe_plugin.compute.gpu.kernels.int8.arithmetic import (
    dots_of_four,
    interleaved,
    look_up,
)


@triton.jit
def four_words(place, live):
    """[N, U, 4] uint32 behind each place [N, U]; whatever is there, where `live` [1, U] is not."""
    words = tl.expand_dims(place, -1) + tl.arange(0, 4)
    shape: tl.constexpr = words.shape
    return tl.load(words, tl.broadcast_to(tl.expand_dims(live, -1), shape))


@triton.jit
def code_words(
    KIND: tl.constexpr,
    SIDE: tl.constexpr,
    base,
    row,
    unit,
    live,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The field with the codes, or with the lower bits of them: the bytes of 16 lanes.

    SIDE is 0 for lanes 0 to 15, 1 for the others; for types with whole bytes, the quarter.
    """
    values: tl.constexpr = ROWS * COLUMNS
    if fact(KIND, "code") == "bytes":
        block = row * (COLUMNS // 32) + unit * 2 + SIDE // 2
        place = field(KIND, "bytes", tl.uint32, base, block, values) + 4 * (SIDE % 2)
        if COLUMNS % 64 != 0 and SIDE >= 2:
            live = live & (unit * 64 + 32 < COLUMNS)
    elif fact(KIND, "values") == 32:
        block = row * (COLUMNS // 32) + unit * 2 + SIDE
        place = field(KIND, "nibbles", tl.uint32, base, block, values)
        if COLUMNS % 64 != 0 and SIDE == 1:
            live = live & (unit * 64 + 32 < COLUMNS)
    else:
        block = row * (COLUMNS // 256) + unit // 4
        if fact(KIND, "code") == "nibbles":
            place = field(KIND, "nibbles", tl.uint32, base, block, values) + (unit % 4) * 8
        else:
            place = field(KIND, "pairs", tl.uint32, base, block, values) + (unit % 4) // 2 * 8
        place += 4 * SIDE
    return four_words(place, live)


@triton.jit
def upper_words(
    KIND: tl.constexpr,
    SIDE: tl.constexpr,
    base,
    row,
    unit,
    live,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The codes' upper bits of 16 lanes, shifted: those of this unit's low codes come lowest."""
    values: tl.constexpr = ROWS * COLUMNS
    block = row * (COLUMNS // 256) + unit // 4
    if fact(KIND, "upper") == "pairs":
        place = field(KIND, "pairs", tl.uint32, base, block, values) + (unit % 4) // 2 * 8
        shift = 2 * (unit % 2)
    else:
        place = field(KIND, "bits", tl.uint32, base, block, values)
        shift = 2 * (unit % 4)
    return four_words(place + 4 * SIDE, live) >> tl.expand_dims(shift, -1).to(tl.uint32)


@triton.jit
def spread_bits(bits, AT: tl.constexpr):
    """[N, U, 4] uint32 words with bit AT + 4 w + i of each of `bits` [N, U] in byte i of word w.

    It comes to the byte's bit 4. The product puts four bits one byte apart.
    """
    word = tl.arange(0, 4)[None, None, :].to(tl.uint32)
    four = (tl.expand_dims(bits, -1) >> (AT + 4 * word)) & 15
    return (four * 0x02040810) & 0x10101010


@triton.jit
def block_bits(
    KIND: tl.constexpr,
    SIDE: tl.constexpr,
    base,
    row,
    unit,
    live,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[N, U] uint32: the upper bits of a block of 32 values."""
    block = row * (COLUMNS // 32) + unit * 2 + SIDE
    if COLUMNS % 64 != 0 and SIDE == 1:
        live = live & (unit * 64 + 32 < COLUMNS)
    place = field(KIND, "bits", tl.uint32, base, block, ROWS * COLUMNS)
    return tl.load(place, tl.broadcast_to(live, place.shape))


@triton.jit
def upper_bits(
    KIND: tl.constexpr,
    SIDE: tl.constexpr,
    base,
    row,
    unit,
    live,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(low, high) words of the codes' upper bits, each where its code wants it."""
    if fact(KIND, "values") == 32:
        bits = block_bits(KIND, SIDE, base, row, unit, live, ROWS, COLUMNS)
        low = spread_bits(bits, 0)
        high = spread_bits(bits, 16)
    else:
        bits = upper_words(KIND, SIDE, base, row, unit, live, ROWS, COLUMNS)
        if fact(KIND, "upper") == "pairs":
            low = (bits << 4) & 0x30303030
            high = bits & 0x30303030
        elif fact(KIND, "code") == "pairs":
            # The high code is read four times as large.
            low = (bits << 2) & 0x04040404
            high = (bits << 3) & 0x10101010
        else:
            low = (bits << 4) & 0x10101010
            high = (bits << 3) & 0x10101010
    return low, high


@triton.jit
def quarter(codes, values, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """[N, U] int32: dot products of a quarter's codes with its activations."""
    zero = tl.zeros(codes.shape, tl.int32)
    _, values = tl.broadcast(codes, values)
    return tl.sum(dots_of_four(codes, values, zero, SIGNED, ASM), axis=2)


@triton.constexpr_function
def high_shift(kind):
    """How many bits too high in its byte a high code is read: where it lies, if it fits there."""
    assert DESCRIPTIONS  # names it, as the functions in `formats.facts` do
    form = FORMATS[kind]
    if form.code == "nibbles":
        return 0 if form.upper else 4
    return 2 if form.code == "pairs" else 0


@triton.jit
def quarter_dots(
    KIND: tl.constexpr,
    SIDE: tl.constexpr,
    base,
    row,
    unit,
    live,
    low,
    high,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ASM: tl.constexpr,
):
    """(low, high) [N, U] int32: dot products of 16 lanes' codes, before zero points.

    Args:
        low, high: [1, U, 4] uint32, the activations of their columns.
    """
    if fact(KIND, "code") == "bytes":
        first = code_words(KIND, SIDE, base, row, unit, live, ROWS, COLUMNS)
        second = code_words(KIND, 2 + SIDE, base, row, unit, live, ROWS, COLUMNS)
    else:
        packed = code_words(KIND, SIDE, base, row, unit, live, ROWS, COLUMNS)
        if fact(KIND, "code") == "pairs":
            packed = packed >> tl.expand_dims(4 * (unit % 2), -1).to(tl.uint32)
            first = packed & 0x03030303
            second = packed & 0x0C0C0C0C
        elif fact(KIND, "upper") == "":
            first = packed & 0x0F0F0F0F
            second = packed & 0xF0F0F0F0
        else:
            first = packed & 0x0F0F0F0F
            second = (packed >> 4) & 0x0F0F0F0F
    if fact(KIND, "upper") != "":
        more_first, more_second = upper_bits(KIND, SIDE, base, row, unit, live, ROWS, COLUMNS)
        first |= more_first
        second |= more_second
    down: tl.constexpr = high_shift(KIND)
    signed: tl.constexpr = fact(KIND, "code") == "bytes"
    return quarter(first, low, signed, ASM), quarter(second, high, signed, ASM) >> down


@triton.jit
def split_words(words):
    """Four [N, U] from words [N, U, 4]."""
    shape: tl.constexpr = [words.shape[0], words.shape[1], 2, 2]
    even, odd = tl.split(tl.reshape(words, shape))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def point_table(KIND: tl.constexpr, tables, live):
    """A type's points as four uint32 words [1, U, 1].

    Each of 32 threads reads its own copy (`formats.tables.point_tables`). Of one that all share the
    compiler knows that all threads have the same, and copies it before every use.
    """
    thread = tl.arange(0, live.shape[1]) % 32
    place = (tables + points_start(KIND)).to(tl.pointer_type(tl.uint32), bitcast=True)
    place += thread[None, :] * 4
    first, second, third, fourth = split_words(four_words(place, live))
    return (
        tl.expand_dims(first, -1),
        tl.expand_dims(second, -1),
        tl.expand_dims(third, -1),
        tl.expand_dims(fourth, -1),
    )


@triton.jit
def point_dots(
    KIND: tl.constexpr,
    SIDE: tl.constexpr,
    base,
    points,
    row,
    unit,
    live,
    low,
    high,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ASM: tl.constexpr,
):
    """[N, U] int32: dot products of a block of 32 columns whose nibbles stand for points.

    `points` is what `point_table` gives; the others are as for `quarter_dots`.
    """
    packed = code_words(KIND, SIDE, base, row, unit, live, ROWS, COLUMNS)
    first, second = look_up(KIND, packed, points, ASM)
    first_values, second_values = interleaved(low, high, ASM)
    _, first_values = tl.broadcast(first, first_values)
    _, second_values = tl.broadcast(second, second_values)
    total = dots_of_four(first, first_values, tl.zeros(first.shape, tl.int32), True, ASM)
    return tl.sum(dots_of_four(second, second_values, total, True, ASM), axis=2)
