"""Which type a pack's weights are stored in, where none is asked for.

float16 has three bits more than bfloat16 at the same size, but ends at 65504. A target computes in
the type of its pack, so both have to fit: the weights, which are looked at while they are packed,
and the activations, about which only the model's family can tell.
"""

from __future__ import annotations

import math

import torch

from hybrimoe_plugin.config import DTYPES
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.families.registry import find_family
from lever_ext.flash.source import TensorSource

AUTO = "auto"
PACK_DTYPES = (AUTO, *DTYPES)
NARROW, WIDE = "float16", "bfloat16"

LARGEST = 32768.0
"""A weight's magnitude in float16: half of what the type holds."""
MOST_LOST = 2.0**-11
"""Relative error, root mean square, of a tensor in float16.

Weights inside its normal range lose 0.4 of it (bfloat16: 3.2 of it); those that fall below the
range lose more.
"""


class DoesNotFitError(Exception):
    """Its text names a tensor that float16 does not hold, and why. Caught by the writer."""


def activations_fit(model_type: str) -> bool:
    """Whether the activations of a model type are expected to stay in float16's range."""
    family = find_family(model_type)
    return family is None or not family.wide_activations


class Narrowed:
    """Another source's weights, each checked to keep its value in float16.

    Raises:
        DoesNotFitError: by `get` and `expert`, for a tensor that does not.
        WeightsError: by the same, for one whose values are not finite in any type.
    """

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.identity = source.identity

    def get(self, name: str) -> torch.Tensor:
        return _checked(name, self.source.get(name))

    def expert(self, name: str, expert: int) -> torch.Tensor:
        return _checked(f"{name}[{expert}]", self.source.expert(name, expert))


def not_held(name: str, value: torch.Tensor, dtype: str) -> WeightsError:
    """The error for a tensor that would not be finite in a type, by the reason for it."""
    largest = _largest(value)
    if not math.isfinite(largest):
        return WeightsError(
            f"tensor {name!r} holds NaN or infinity: the model's file is damaged, or went wrong "
            "when it was made; get it anew"
        )
    most = torch.finfo(getattr(torch, dtype)).max
    return WeightsError(
        f"tensor {name!r} reaches {largest:.4g}, and {dtype} ends at {most:.5g}; choose a wider "
        "type by --dtype (dtype=...)"
    )


def _largest(value: torch.Tensor) -> float:
    return float(value.double().abs().max())


def _checked(name: str, value: torch.Tensor) -> torch.Tensor:
    misfit = _misfit(name, value)
    if misfit is not None:
        raise DoesNotFitError(f"{name} {misfit}")
    return value


def _misfit(name: str, value: torch.Tensor) -> str | None:
    """Why float16 does not hold a tensor; None where it does. Raises: WeightsError: not finite."""
    exact = value.float()
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    if not largest <= LARGEST:  # neither does NaN
        if not math.isfinite(_largest(value)):
            raise not_held(name, value, NARROW)
        return f"reaches {largest:.3g}"
    lost = float((exact.half().float() - exact).norm())
    whole = float(exact.norm())
    if lost > MOST_LOST * whole:
        return f"would lose {lost / whole:.2g} of its values"
    return None
