"""Rotary position embeddings (RoPE) by a model's own cos and sin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.errors import InputError

RotaryFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Rotary embedding of x [..., D] by cos and sin [..., D / 2]."""


class Rope(NamedTuple):
    """The rotary embedding of a model's attention."""

    rotate: RotaryFunction
    width: int
    """Values of a head that are rotated: all of them, or DeepSeek's `qk_rope_head_dim`."""


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [..., D], whose pairs are (x[i], x[i + D / 2]); cos and sin are [..., D / 2]."""
    half = x.shape[-1] // 2
    first = x[..., :half]
    second = x[..., half:]
    return _rotated(first, second, cos, sin)


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same for pairs (x[2 i], x[2 i + 1]).

    The result has its pairs as halves. Queries and keys are reordered alike, so their dot products
    do not change.
    """
    first = x[..., 0::2]
    second = x[..., 1::2]
    return _rotated(first, second, cos, sin)


def cos_sin(embeddings: Any, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B or 1, 1, T, D / 2] from what the model's rotary module returns.

    Args:
        embeddings: (cos, sin), each [B or 1, T, D]; or complex numbers [B or 1, T, D / 2], as in
            DeepSeek-V2.
        half: D / 2.

    Raises:
        InputError: they have other dimensions, because the position ids had.
    """
    is_complex = isinstance(embeddings, torch.Tensor)
    given = embeddings if is_complex else embeddings[0]
    if given.ndim != 3:
        raise InputError(
            f"position_ids must be [batch, tokens], they gave angles {list(given.shape)}"
        )
    if is_complex:
        cos = embeddings.real[:, None]
        sin = embeddings.imag[:, None]
        return cos, sin
    cos, sin = embeddings
    # Both halves of the last dimension are alike.
    cos = cos[:, None, :, :half]
    sin = sin[:, None, :, :half]
    return cos, sin


def _rotated(
    first: torch.Tensor, second: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    return torch.cat((rotated_first, rotated_second), dim=-1)
