"""What a type's description says, for kernels while they are compiled."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import inspect

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.formats import description

# Triton's key of a compiled kernel is made of its source and of constants such as this one, not of
# what the functions below return. Each of them names it, so that with another description kernels
# are compiled anew.
DESCRIPTIONS = tl.constexpr(inspect.getsource(description))


@triton.constexpr_function
def fact(kind, name):
    """An attribute of a type's description."""
    assert DESCRIPTIONS
    return getattr(description.FORMATS[kind], name)


@triton.constexpr_function
def field_start(kind, field, values):
    """As `Format.start`."""
    assert DESCRIPTIONS
    return description.FORMATS[kind].start(field, values)


@triton.constexpr_function
def field_stride(kind, field):
    """As `Format.stride`."""
    assert DESCRIPTIONS
    return description.FORMATS[kind].stride(field)


@triton.constexpr_function
def points_word(kind, upper):
    """As `Format.points_word`."""
    assert DESCRIPTIONS
    return description.FORMATS[kind].points_word(upper)


@triton.constexpr_function
def points_start(kind):
    """As `description.POINT_STARTS`."""
    assert DESCRIPTIONS
    return description.POINT_STARTS[kind]


@triton.constexpr_function
def grid_start(kind):
    """As `description.GRID_STARTS`."""
    assert DESCRIPTIONS
    return description.GRID_STARTS[kind]
