"""Activations in int8: one scale for 32 columns, as the int8 decode kernels read them."""

from __future__ import annotations

import torch

GROUP = 32
"""Columns that share a scale."""


def quantise_activations(values: torch.Tensor) -> torch.Tensor:
    """What int8 kernels see of `values`, in float32 and the same shape.

    A group's scale is its largest magnitude / 127 in float32; codes are values / scale, rounded to
    the nearest, to the even one of two. A group with a value that is not finite becomes NaN.

    Args:
        values: [..., columns] floating point; columns are a multiple of 32.
    """
    codes, scales = int8_codes(values)
    groups = codes.float().unflatten(-1, (-1, GROUP)) * scales[..., None]
    return groups.flatten(-2)


def int8_codes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [..., columns] int8, scales [..., columns / 32] float32) of `quantise_activations`."""
    groups = values.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(dim=-1)
    # By a tensor: a GPU divides by a number by multiplying with its reciprocal, which rounds twice.
    scales = largest / torch.full_like(largest, 127.0)
    finite = groups.isfinite().all(dim=-1)
    steps = torch.where(finite & (scales > 0), scales, 1.0)[..., None]
    # Scales below float32's smallest normal number are coarse: codes beyond 127 are possible.
    codes = (groups / steps).round().clamp(-127, 127)
    codes = torch.where(finite[..., None], codes, 0.0)
    return codes.to(torch.int8).flatten(-2), torch.where(finite, scales, torch.nan)
