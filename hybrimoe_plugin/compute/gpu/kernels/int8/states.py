"""Activations in int8 on the device: how they are made, where they lie, how they are read.

A vector of C columns, filled up with zeros to P, a multiple of 128, lies in P * 11 / 8 bytes:

    | P codes, int8 | P / 32 scales, float32 | P / 16 sums of 16 codes, int32 |

`activations.quantise_activations` says which codes and scales.
"""

# Triton's idiom: constants in capitals, arguments without Python types. Kernels stay dense: their
# operations and the order of these are what is compiled and compared bit for bit.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.formats.facts import fact


def state_bytes(columns: int) -> int:
    """Bytes of one vector's activations."""
    return padded(columns) * 11 // 8


def padded(columns: int) -> int:
    """Columns with the zeros behind them."""
    return -(-columns // 128) * 128


@triton.constexpr_function
def padded_columns(columns):
    """As `padded`."""
    return -(-columns // 128) * 128


@triton.jit
def quantise(states, found, COLUMNS: tl.constexpr, GROUPS: tl.constexpr):
    """Write vectors [V, COLUMNS] of any float type as above; grid (V, blocks of GROUPS groups)."""
    width: tl.constexpr = padded_columns(COLUMNS)
    vector = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    values = tl.load(states + vector * COLUMNS + column, column < COLUMNS, 0.0).to(tl.float32)
    steps = tl.div_rn(tl.max(tl.abs(values), axis=1), tl.full([GROUPS], 127.0, tl.float32))
    # 0 times what is not finite is NaN, which no comparison hides.
    finite = tl.sum(values * 0.0, axis=1) == 0.0
    divisor = tl.where((steps > 0.0) & finite, steps, 1.0)[:, None]
    scaled = tl.div_rn(values, tl.broadcast_to(divisor, values.shape))
    scaled = tl.minimum(tl.maximum(tl.where(finite[:, None], scaled, 0.0), -127.0), 127.0)
    # Adding 1.5 * 2^23 leaves no room for a fraction: the nearest integer stays, the even of two.
    codes = ((scaled + 12582912.0) - 12582912.0).to(tl.int32)
    own = found + vector * (width * 11 // 8)
    inside = group < width // 32
    tl.store(
        own.to(tl.pointer_type(tl.int8), bitcast=True) + column, codes.to(tl.int8), inside[:, None]
    )
    place = (own + width).to(tl.pointer_type(tl.float32), bitcast=True) + group
    tl.store(place, tl.where(finite, steps, float("nan")), inside)
    sums = tl.sum(tl.reshape(codes, (GROUPS, 2, 16)), axis=2)
    place = (own + width * 9 // 8).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(place + group[:, None] * 2 + tl.arange(0, 2)[None, :], sums, inside[:, None])


@triton.jit
def low_word(KIND: tl.constexpr, unit):
    """The word of codes with which a unit's low columns begin."""
    if fact(KIND, "step") == 64:  # noqa: SIM108 - as a choice of constants
        word = (unit // 2) * 32 + (unit % 2) * 8
    else:
        word = unit * 16
    return word


@triton.jit
def quarter_words(KIND: tl.constexpr, states, units, live, COLUMNS: tl.constexpr):
    """[1, U, 4] uint32 codes of each quarter: low and high of 16 lanes, then of the others."""
    side: tl.constexpr = 8 if fact(KIND, "step") == 16 else 4
    high: tl.constexpr = fact(KIND, "step") // 4
    first = states.to(tl.pointer_type(tl.uint32), bitcast=True) + low_word(KIND, units)
    place = first[None, :, None] + tl.arange(0, 4)[None, None, :]
    mask = tl.broadcast_to(live[None, :, None], place.shape)
    return (
        tl.load(place, mask),
        tl.load(place + high, mask),
        tl.load(place + side, mask),
        tl.load(place + side + high, mask),
    )


@triton.jit
def group_steps(KIND: tl.constexpr, states, units, live, COLUMNS: tl.constexpr):
    """[1, U] float32 scales of a unit's two groups of 32 columns."""
    width: tl.constexpr = padded_columns(COLUMNS)
    apart: tl.constexpr = 2 if fact(KIND, "step") == 64 else 1
    place = (states + width).to(tl.pointer_type(tl.float32), bitcast=True)
    place = (place + low_word(KIND, units) // 8)[None, :]
    mask = live[None, :]
    return tl.load(place, mask), tl.load(place + apart, mask)


@triton.jit
def quarter_sums(KIND: tl.constexpr, states, units, live, COLUMNS: tl.constexpr):
    """[1, U] int32 sums of each quarter's codes, in the order of `quarter_words`."""
    width: tl.constexpr = padded_columns(COLUMNS)
    side: tl.constexpr = 2 if fact(KIND, "step") == 16 else 1
    high: tl.constexpr = fact(KIND, "step") // 16
    place = (states + width * 9 // 8).to(tl.pointer_type(tl.int32), bitcast=True)
    place = (place + low_word(KIND, units) // 4)[None, :]
    mask = live[None, :]
    return (
        tl.load(place, mask),
        tl.load(place + high, mask),
        tl.load(place + side, mask),
        tl.load(place + side + high, mask),
    )
