"""Attention in plain torch: what operators use, and what other kernels are compared with."""

from __future__ import annotations

import torch
from torch.nn import functional as F

_LARGE_KEYS = 1 << 16
"""Keys of this many values do not stay in a core's cache from one head of a group to the next."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    grouped: bool,
) -> torch.Tensor:
    """Attention of queries [B, heads, T, D] over all keys and values so far: [B, heads, T, D].

    Args:
        mask: None for causal attention.
        grouped: several query heads share a key head.
    """
    one_token = query.shape[2] == 1
    if grouped and one_token and _folds_groups(key, mask):
        return _attend_folded(query, key, value, mask, scaling)
    causal = mask is None and not one_token
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
    )


def _folds_groups(key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the query heads of a group are to be computed as query tokens of one head.

    Kernels that take a mask know no groups: torch would copy keys and values for every query head.
    The CPU's kernel reads them anew for every head, which is a quarter of a decode step behind
    2,048 tokens (8 heads a group, docs/LOG.md).
    """
    if mask is not None:
        return mask.shape[1] == 1
    return key.device.type == "cpu" and key.numel() >= _LARGE_KEYS


def _attend_folded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """One token: queries [B, heads, 1, D] as [B, key heads, heads of a group, D]."""
    batch, heads, _, width = query.shape
    folded = query.reshape(batch, key.shape[1], -1, width)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, 1, -1)


def attend_latents(
    query: torch.Tensor,
    compressed: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    latent: int,
) -> torch.Tensor:
    """Absorbed latent attention (DeepSeek-V2, section 2.1): [B, heads, T, latent].

    Args:
        query: [B, heads, T, latent + rope].
        compressed: the cache [B, 1, C, latent + rope]. All heads share it: as a whole it is the
            keys, its latents are the values.
        mask: None for causal attention.
        latent: width of a latent.
    """
    if query.shape[2] > 1:
        out = attend(query, compressed, compressed, mask, scaling, grouped=True)
        return out[..., :latent]
    # One token: its heads attend to the same keys, so all of them are one matrix product. torch's
    # fused attention takes head by head.
    if len(query) == 1 and mask is None:
        return _attend_latents_unmasked(query, compressed, scaling, latent)
    keys = compressed[:, 0]
    scores = torch.matmul(query[:, :, 0] * scaling, keys.transpose(1, 2))
    if mask is not None:
        scores = _masked(scores, mask[:, 0])
    weights = torch.softmax(scores, -1, dtype=torch.float32)
    weights = weights.to(keys.dtype)
    values = keys[..., :latent]
    return torch.matmul(weights, values)[:, :, None]


def _attend_latents_unmasked(
    query: torch.Tensor, compressed: torch.Tensor, scaling: float, latent: int
) -> torch.Tensor:
    """The same for B = T = 1, with plain matrices: 28 us instead of 35 at 150 tokens."""
    keys = compressed[0, 0]
    scores = torch.mm(query[0, :, 0] * scaling, keys.t())
    weights = torch.softmax(scores, -1, dtype=torch.float32)
    weights = weights.to(keys.dtype)
    out = torch.mm(weights, keys[:, :latent])
    return out[None, :, None]


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask
