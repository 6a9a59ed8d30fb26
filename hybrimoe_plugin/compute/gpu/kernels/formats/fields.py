"""Where the fields of GGML blocks lie in a slot, for kernels."""

# Triton's idiom: constants in capitals, arguments without Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.formats.facts import field_start, field_stride


@triton.jit
def field(
    KIND: tl.constexpr,
    NAME: tl.constexpr,
    TYPE: tl.constexpr,
    base,
    block,
    VALUES: tl.constexpr,
):
    """Where a field of each block begins in a matrix of so many values, as a pointer to TYPE.

    It counts in words of that type, so that Triton sees neighbours in them.
    """
    size: tl.constexpr = TYPE.primitive_bitwidth // 8
    start: tl.constexpr = field_start(KIND, NAME, VALUES) // size
    stride: tl.constexpr = field_stride(KIND, NAME) // size
    return base.to(tl.pointer_type(TYPE), bitcast=True) + block * stride + start
