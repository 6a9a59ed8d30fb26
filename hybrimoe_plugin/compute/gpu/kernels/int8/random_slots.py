"""Random experts in slots: random codes, with scales that keep weights of a usual size."""

from __future__ import annotations

import torch

from hybrimoe_plugin.compute.gpu.kernels.formats.description import FORMATS, Format
from hybrimoe_plugin.compute.gpu.kernels.layout import Part, SlotLayout, from_planes
from hybrimoe_plugin.weights.dequant import dequantize

_BITS = {"nibbles": 4, "pairs": 2, "bits": 1, "": 0}
"""Field -> how many of a code's bits it holds."""


def fill_randomly(slots: torch.Tensor, layout: SlotLayout) -> None:
    """Weights are of the order 1 / sqrt(columns), biases normal; torch's own generator is used.

    Types without such a field (floats, IQ1_M) stay as random as their bytes.

    Mutates: slots [n, slot bytes] uint8.
    """
    slots.random_(0, 256)
    for part in (layout.gate, layout.up, layout.down):
        form = FORMATS[part.type_name]
        if form.integers:
            _scale(slots[:, part.span], part, form)
    if layout.biases is not None:
        size = (len(slots), layout.biases.columns)
        values = torch.randn(size, device=slots.device)
        slots[:, layout.biases.span] = values.view(torch.uint8)


def _scale(stored: torch.Tensor, part: Part, form: Format) -> None:
    """Mutates: stored [n, bytes] of one matrix."""
    _set_scales(stored, part, form, 2.0**-6)
    weights = dequantize(
        from_planes(stored[0], part.type_name), part.type_name, (part.rows, part.columns)
    )
    size = float(weights.square().mean().sqrt()) * part.columns**0.5
    _set_scales(stored, part, form, 2.0**-6 / size)


def _set_scales(stored: torch.Tensor, part: Part, form: Format, size: float) -> None:
    """Random scales of half to one and a half times `size`, or the power of two near it."""
    values = part.rows * part.columns
    count = values // form.values
    mean_code = (2 ** (_BITS.get(form.code, 0) + _BITS[form.upper]) - 1) / 2
    # With such minima weights have a mean of 0, and nothing hides behind it.
    sizes = {"d": size, "exponent": size, "dmin": mean_code * size, "m": -mean_code * size}
    for name, width in form.fields:
        if name not in sizes:
            continue
        start, stride = form.start(name, values), form.stride(name)
        places = stored[:, start : start + (count - 1) * stride + width].unfold(1, width, stride)
        drawn = sizes[name] * (0.5 + torch.rand(len(stored), count, 1, device=stored.device))
        if name == "exponent":
            places.copy_((drawn.log2().round() + 127).to(torch.uint8))
        else:
            places.copy_(drawn.half().view(torch.uint8))
