"""Dot products of units of 64 columns with int8 activations."""

# Triton's idiom: constants in capitals, arguments without Python types. Kernels stay dense: their
# operations and the order of these are what is compiled and compared bit for bit. `fma` says where
# one is meant, so that no compiler chooses.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.formats.facts import fact
from hybrimoe_plugin.compute.gpu.kernels.int8.scales import (
    block_float,
    group_scales,
    k_header,
    quarter_scales,
    two_floats,
)
from hybrimoe_plugin.compute.gpu.kernels.int8.states import (
    group_steps,
    quarter_sums,
    quarter_words,
)
from hybrimoe_plugin.compute.gpu.kernels.int8.words import point_dots, point_table, quarter_dots


@triton.jit
def weighted(first, second, steps_first, steps_second):
    """float32: two groups' integers, each times its scale of the activations."""
    later = second.to(tl.float32) * steps_second
    return tl.fma(first.to(tl.float32), steps_first, later)


@triton.jit
def integer_dots(
    KIND: tl.constexpr,
    matrices,
    states,
    tables,
    rows,
    units,
    live,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ASM: tl.constexpr,
):
    """[N, U] float32 dot products of rows [N] and units [U]; anything where `live` [U] is not.

    Each unit has its own matrix and vector: `matrices` and `states` [U] point at the starts of what
    `units` count in, `tables` at what codes stand for. Rows must lie in the matrix.
    """
    row = rows[:, None]
    unit = units[None, :]
    base = matrices[None, :]
    inside = live[None, :]
    low_a, high_a, low_b, high_b = quarter_words(KIND, states, units, live, COLUMNS)
    steps_first, steps_second = group_steps(KIND, states, units, live, COLUMNS)
    if fact(KIND, "int8_points") != ():
        tl.static_assert(fact(KIND, "step") == 16)
        points = point_table(KIND, tables, inside)
        first = point_dots(
            KIND, 0, base, points, row, unit, inside, low_a, high_a, ROWS, COLUMNS, ASM
        )
        second = point_dots(
            KIND, 1, base, points, row, unit, inside, low_b, high_b, ROWS, COLUMNS, ASM
        )
    else:
        first_low, first_high = quarter_dots(
            KIND, 0, base, row, unit, inside, low_a, high_a, ROWS, COLUMNS, ASM
        )
        last_low, last_high = quarter_dots(
            KIND, 1, base, row, unit, inside, low_b, high_b, ROWS, COLUMNS, ASM
        )
    zero: tl.constexpr = fact(KIND, "zero")
    if zero != 0 or fact(KIND, "minima"):
        sum_la, sum_ha, sum_lb, sum_hb = quarter_sums(KIND, states, units, live, COLUMNS)
    if zero != 0:
        first_low -= zero * sum_la
        first_high -= zero * sum_ha
        last_low -= zero * sum_lb
        last_high -= zero * sum_hb
    if KIND == "Q4_K" or KIND == "Q5_K":
        d, dmin, s_low, s_high, m_low, m_high = k_header(
            KIND, base, row, unit, inside, ROWS, COLUMNS
        )
        low = s_low * (first_low + last_low)
        high = s_high * (first_high + last_high)
        dots = d * weighted(low, high, steps_first, steps_second)
        low = m_low * (sum_la + sum_lb)
        high = m_high * (sum_ha + sum_hb)
        dots = tl.fma(-dmin, weighted(low, high, steps_first, steps_second), dots)
    elif KIND == "IQ4_XS":
        s_first, s_second = group_scales(KIND, base, row, unit, inside, ROWS, COLUMNS)
        first = s_first * first
        second = s_second * second
        d = block_float(KIND, "d", base, row, unit, inside, ROWS, COLUMNS)
        dots = d * weighted(first, second, steps_first, steps_second)
    elif fact(KIND, "values") == 256:
        scales, minima = quarter_scales(KIND, base, row, unit, inside, ROWS, COLUMNS)
        low = scales[0] * first_low + scales[2] * last_low
        high = scales[1] * first_high + scales[3] * last_high
        d = block_float(KIND, "d", base, row, unit, inside, ROWS, COLUMNS)
        dots = d * weighted(low, high, steps_first, steps_second)
        if fact(KIND, "minima"):
            low = minima[0] * sum_la + minima[2] * sum_lb
            high = minima[1] * sum_ha + minima[3] * sum_hb
            dmin = block_float(KIND, "dmin", base, row, unit, inside, ROWS, COLUMNS)
            dots = tl.fma(-dmin, weighted(low, high, steps_first, steps_second), dots)
    else:
        if fact(KIND, "int8_points") != ():
            tl.static_assert(zero == 0)
        elif fact(KIND, "step") == 16:
            first = first_low + first_high
            second = last_low + last_high
        else:
            first = first_low + last_low
            second = first_high + last_high
        name: tl.constexpr = "exponent" if fact(KIND, "e2m1") else "d"
        d_first, d_second = two_floats(KIND, name, base, row, unit, inside, ROWS, COLUMNS)
        dots = (d_second * steps_second) * second.to(tl.float32)
        dots = tl.fma(d_first * steps_first, first.to(tl.float32), dots)
        if fact(KIND, "minima"):
            m_first, m_second = two_floats(KIND, "m", base, row, unit, inside, ROWS, COLUMNS)
            dots = tl.fma(m_second * steps_second, (sum_lb + sum_hb).to(tl.float32), dots)
            dots = tl.fma(m_first * steps_first, (sum_la + sum_ha).to(tl.float32), dots)
    return dots
