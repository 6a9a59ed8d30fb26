"""Attention itself, in torch: what operators use and what other kernels are compared with."""

from __future__ import annotations

import torch
from torch.nn import functional as F

_LARGE = 1 << 16
"""Keys of so many values do not stay in a core's cache while the heads of a group take turns."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    grouped: bool,
) -> torch.Tensor:
    """[B, heads, T, D] from queries [B, heads, T, D] and the keys and values so far; causal where
    no mask is given.
    """
    if grouped and query.shape[2] == 1 and _as_rows(key, mask):
        # The heads of a group become rows of one product. Kernels that take a mask know no groups:
        # torch would copy keys and values for every query head. The CPU's kernel reads them anew
        # for every head, which is a quarter of a decode step behind 2,048 tokens (8 heads a group,
        # docs/LOG.md).
        rows = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
        return out.reshape(len(query), query.shape[1], 1, -1)
    causal = mask is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
    )


def _as_rows(key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    if mask is not None:
        return mask.shape[1] == 1
    return key.device.type == "cpu" and key.numel() >= _LARGE


def attend_latents(
    query: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor | None, scaling: float, width: int
) -> torch.Tensor:
    """[B, heads, T, width] from queries [B, heads, T, D] over keys [B, 1, C, D] whose first values
    are the values.
    """
    if query.shape[2] > 1:
        return attend(query, rows, rows, mask, scaling, grouped=True)[..., :width]
    # One token: all heads share the rows, so this is one matrix product; torch's fused attention
    # takes head by head.
    if len(query) == 1 and mask is None:  # plain matrices: 28 in place of 35 us at 150 rows
        states = rows[0, 0]
        weights = torch.softmax(
            torch.mm(query[0, :, 0] * scaling, states.t()), -1, dtype=torch.float32
        )
        return torch.mm(weights.to(states.dtype), states[:, :width])[None, :, None]
    states = rows[:, 0]
    scores = torch.matmul(query[:, :, 0] * scaling, states.transpose(1, 2))
    if mask is not None:
        mask = mask[:, 0]
        scores = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        )
    weights = torch.softmax(scores, -1, dtype=torch.float32)
    return torch.matmul(weights.to(states.dtype), states[..., :width])[:, :, None]
