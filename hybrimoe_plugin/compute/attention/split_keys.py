"""Attention of one token with the keys split over the device (flash-decoding, Dao et al. 2023).

A token has few key heads, so a block for each of them leaves most of a device idle. Here the
entries that the token sees are cut into ranges, and each program takes one range of one key head,
for the query heads that share it:

    entries of key head 0    | range 0 | range 1 | range 2 |  spare capacity  |
                                  |         |         |            not read
                              its largest score, the sum of its weights, their sum of values
                                  |         |         |
                                  +---- combined for each query head ----> output

How many entries there are is read on the device, so that a CUDA graph holds no number of it. The
ranges are those of the step: all programs share the work whatever the position, and those that are
left without any end at once.
"""

# Triton's idiom: constants in capitals, arguments without Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _range_length(visible, ranges, TOKENS: tl.constexpr):
    """Entries of a range: whole tiles, as few as let all ranges hold what is visible."""
    tiles = tl.cdiv(visible, TOKENS)
    return tl.cdiv(tiles, ranges) * TOKENS


@triton.jit(do_not_specialize=["ranges"])
def attend_ranges(
    query,
    keys,
    values,
    position,
    sums,
    maxima,
    totals,
    query_stride,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    scale,
    ranges,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    MAIN: tl.constexpr,
    MAIN_BLOCK: tl.constexpr,
    REST: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """One range of one key head; grid (key heads x blocks of query heads, ranges).

    query     [heads, MAIN + REST]
    keys      [key heads, capacity, MAIN + REST]
    values    [key heads, capacity, VALUES]; not read where the columns MAIN are the values too
    position  [1] int64: the entry of the token, which is the last one that it sees
    sums      [heads, ranges, VALUES] float32: values times weights
    maxima    [heads, ranges] float32: the largest score, in powers of 2
    totals    [heads, ranges] float32: sum of the weights
    scale     of the scores, times log2(e)

    GROUP     query heads of a key head
    HEADS     of them in one program; a power of 2, at least 16
    TOKENS    entries of a tile
    ..._BLOCK widths, rounded up to powers of 2; REST is 0 for keys in one piece
    VALUES    0 where the columns MAIN of the keys are the values
    """
    blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    key_head = tl.program_id(0) // blocks
    in_group = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    of_range = tl.program_id(1)
    visible = tl.load(position).to(tl.int32) + 1
    length = _range_length(visible, ranges, TOKENS)
    first = of_range * length
    if first >= visible:
        return
    end = tl.minimum(first + length, visible)

    ours = in_group[:, None] < GROUP
    head = key_head * GROUP + in_group
    main = tl.arange(0, MAIN_BLOCK)
    rest = tl.arange(0, REST_BLOCK)
    queries = query + head[:, None] * query_stride
    query_main = tl.load(queries + main[None, :], ours & (main[None, :] < MAIN), other=0.0)
    query_main = query_main.to(DOT)
    if REST > 0:
        query_rest = tl.load(queries + MAIN + rest[None, :], ours & (rest[None, :] < REST), 0.0)
        query_rest = query_rest.to(DOT)
    keys += key_head.to(tl.int64) * key_head_stride
    values += key_head.to(tl.int64) * value_head_stride
    column = tl.arange(0, VALUE_BLOCK)
    in_tile = tl.arange(0, TOKENS)

    maximum = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    summed = tl.zeros([HEADS, VALUE_BLOCK], tl.float32)
    for start in range(first, end, TOKENS):
        # What lies behind the end may be anything, also no number: it is never read.
        seen = start + in_tile < end
        rows = keys + tl.cast(start, tl.int64) * key_stride + in_tile[:, None] * key_stride
        key = tl.load(rows + main[None, :], seen[:, None] & (main[None, :] < MAIN), other=0.0)
        key = key.to(DOT)
        scores = tl.dot(query_main, tl.trans(key), input_precision="ieee")
        if REST > 0:
            in_rest = seen[:, None] & (rest[None, :] < REST)
            key_rest = tl.load(rows + MAIN + rest[None, :], in_rest, other=0.0).to(DOT)
            scores += tl.dot(query_rest, tl.trans(key_rest), input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        kept = tl.exp2(maximum - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * kept + tl.sum(weights, 1)
        if VALUES > 0:
            rows = (
                values + tl.cast(start, tl.int64) * value_stride + in_tile[:, None] * value_stride
            )
            in_values = seen[:, None] & (column[None, :] < VALUES)
            value = tl.load(rows + column[None, :], in_values, other=0.0).to(DOT)
        else:
            value = key
        summed = summed * kept[:, None]
        summed = tl.dot(weights.to(DOT), value, summed, input_precision="ieee")
        maximum = larger

    width: tl.constexpr = VALUES if VALUES > 0 else MAIN
    place = head * ranges + of_range
    tl.store(maxima + place, maximum, in_group < GROUP)
    tl.store(totals + place, total, in_group < GROUP)
    there = sums + place[:, None] * width + column[None, :]
    tl.store(there, summed, ours & (column[None, :] < width))


@triton.jit(do_not_specialize=["ranges"])
def combine_ranges(
    position,
    sums,
    maxima,
    totals,
    output,
    ranges,
    RANGES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The attention of each head from that of its ranges; grid (heads, blocks of COLUMNS).

        output [heads, WIDTH]

        RANGES at least `ranges`, and a power of 2

    The others are as in `attend_ranges`. Ranges without entries hold what an earlier step left, and
    are not read.
    """
    head = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    of_range = tl.arange(0, RANGES)
    visible = tl.load(position).to(tl.int32) + 1
    used = of_range * _range_length(visible, ranges, TOKENS) < visible
    place = head * ranges + of_range
    maximum = tl.load(maxima + place, used, other=float("-inf"))
    total = tl.load(totals + place, used, other=0.0)
    share = tl.exp2(maximum - tl.max(maximum, 0))
    inside = column[None, :] < WIDTH
    there = sums + place[:, None] * WIDTH + column[None, :]
    summed = tl.load(there, used[:, None] & inside, other=0.0)
    result = tl.sum(summed * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(output + head * WIDTH + column, result, column < WIDTH)
