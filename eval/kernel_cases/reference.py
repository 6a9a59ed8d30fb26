"""The float64 reference of the device kernels, and how far a result is from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import silu

from eval.kernel_cases.shapes import Shape
from hybrimoe_plugin.weights.dequant import dequantize


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch allocates within with NaN.

    A value that nobody wrote cannot pass for a result then.
    """
    settings: Any = torch.utils.deterministic
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(was, warn_only=warned)


def reference(
    shape: Shape,
    matrices: Sequence[torch.Tensor],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    routing: torch.Tensor,
) -> torch.Tensor:
    """What all experts but number 0 contribute, computed one after another.

    Args:
        matrices: stored bytes of gate, up and down, each [experts, bytes].
        hidden: [T, H].
        ids: [T, K] experts.
        routing: [T, K] weights.

    Returns:
        [T, H] float64 on hidden's device.
    """
    output = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    inner = (shape.intermediate, shape.hidden)
    outer = (shape.hidden, shape.intermediate)
    sizes = (inner, inner, outer)
    for expert in range(1, shape.experts):
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        gate, up, down = (
            dequantize(matrix[expert].clone(), kind, size).double()
            for matrix, kind, size in zip(matrices, shape.kinds, sizes, strict=True)
        )
        states = hidden[tokens].double()
        activations = silu(states @ gate.T) * (states @ up.T)
        weights = routing[tokens, places].double()[:, None]
        output.index_add_(0, tokens, activations @ down.T * weights)
    return output


def rms_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the difference, relative to what was wanted."""
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-12))
