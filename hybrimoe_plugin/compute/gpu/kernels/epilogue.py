"""What Triton kernels compute after a product: biases, and the activation between two products."""

# Triton's idiom: constants in capitals, arguments without Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.layout import SlotLayout


class Epilogue(NamedTuple):
    """Constants of the kernels below, which are compiled for them."""

    bias_offset: int
    """Bytes from a slot's start to its biases; -1 for none."""
    kind: str
    alpha: float
    limit: float
    """0 where nothing is clamped."""
    up_shift: float

    @classmethod
    def of(cls, layout: SlotLayout) -> Epilogue:
        offset = -1 if layout.biases is None else layout.biases.offset
        form = layout.activation
        return cls(offset, form.kind, form.alpha, form.limit, form.up_shift)


@triton.jit
def biases(slot, at, rows, OFFSET: tl.constexpr, ROWS: tl.constexpr):
    """[N] float32: the biases of rows [N], of those that begin `at` values behind the first."""
    values = (slot + OFFSET).to(tl.pointer_type(tl.float32), bitcast=True)
    return tl.load(values + at + rows, rows < ROWS, 0.0)


@triton.jit
def activated(
    gate,
    up,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_SHIFT: tl.constexpr,
):
    """As `compute.activation.activate`, in float32; a LIMIT of 0 is none."""
    if LIMIT > 0:
        # A NaN stays one.
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, up)
        up = tl.where(up < -LIMIT, -LIMIT, up)
    if UP_SHIFT != 0:
        up += UP_SHIFT
    if KIND == "gelu":
        value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # tanh by its exponential, which does not overflow on the negative side.
        value = gate / (1.0 + tl.exp(-2.0 * inner))
    elif KIND == "relu":
        value = tl.where(gate < 0, 0.0, gate)
    elif ALPHA == 1.0:
        value = gate / (1.0 + tl.exp(-gate))
    else:
        value = gate / (1.0 + tl.exp(-ALPHA * gate))
    return value * up
