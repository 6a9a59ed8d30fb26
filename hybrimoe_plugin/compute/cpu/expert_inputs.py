"""Check the tensors of a layer call before native kernels see them.

These kernels end the process, or read memory that is not theirs, on what they do not expect.
"""

from __future__ import annotations

import torch

from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.errors import BackendError

_ID_TYPES = (torch.int64, torch.int32)


def check_kinds(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    """Check devices and dtypes.

    Raises:
        BackendError: a tensor is not on the CPU, or of a type that a kernel's conversion would
            change silently.
    """
    # Attributes in one expression: this is asked in every layer of every token.
    if not (
        hidden.is_cpu
        and weights.is_cpu
        and hidden.is_floating_point()
        and weights.is_floating_point()
    ):
        _refuse_kind("hidden states", hidden)
        _refuse_kind("expert weights", weights)
    if not ids.is_cpu or ids.dtype not in _ID_TYPES:
        raise BackendError(
            f"expert ids must be int64 or int32 on the CPU, found {ids.dtype} on {ids.device}"
        )


def _refuse_kind(what: str, tensor: torch.Tensor) -> None:
    if tensor.is_cpu and tensor.is_floating_point():
        return
    raise BackendError(
        f"{what} must be floating point on the CPU, found {tensor.dtype} on {tensor.device}"
    )


def check_shapes(
    spec: ExpertSpec, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """Check that hidden is [T, H] and ids and weights are [T, K].

    Raises:
        BackendError: with the shapes.
    """
    if hidden.ndim != 2 or hidden.shape[1] != spec.hidden:
        raise BackendError(f"hidden states must be [T, {spec.hidden}], found {list(hidden.shape)}")
    if ids.shape != weights.shape or ids.ndim != 2 or len(ids) != len(hidden):
        raise BackendError(
            f"ids {list(ids.shape)} and weights {list(weights.shape)} must be [{len(hidden)}, K]"
        )


def check_range(spec: ExpertSpec, low: int, high: int) -> None:
    """Check the smallest and the largest expert id. Raises: BackendError."""
    if low < 0 or high >= spec.experts:
        raise BackendError(f"expert ids must be 0 to {spec.experts - 1}, found {low} to {high}")


def each_once(
    spec: ExpertSpec, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights [T, K] of the same sums, in which no token names an expert twice.

    Tables of experts by token id (DeepSeek-V4) may name one twice. It gets the sum of its weights,
    and the place that it leaves goes to an expert that was not chosen, with a weight of 0.

    Raises:
        BackendError: K is larger than the number of experts.
    """
    tokens, top_k = ids.shape
    if top_k > spec.experts:
        raise BackendError(f"a token names {top_k} of {spec.experts} experts")
    total = weights.new_zeros(tokens, spec.experts).scatter_add_(1, ids.long(), weights)
    chosen = torch.zeros_like(total).scatter_(1, ids.long(), 1.0)
    distinct = chosen.topk(top_k, dim=1).indices
    return distinct.to(ids.dtype), total.gather(1, distinct)
