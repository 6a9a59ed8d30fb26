"""`flash_attn` by torch's scaled dot product attention, without support for padding.

Layout [B, T, heads, D] throughout, as in flash-attn 2. Masks are causal to the bottom
right: the last query sees every key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hybrimoe_plugin.errors import BackendError

__version__ = "2.6.0"


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **_options: Any,
) -> torch.Tensor:
    """[B, Tq, heads, D] from queries of that shape, keys and values [B, Tk, heads or fewer, D].

    Raises:
        BackendError: a sliding window.
    """
    _refuse_window(window_size)
    mask = None
    if causal and q.shape[1] > 1:
        rows, columns = q.shape[1], k.shape[1]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
    return _attend(q, k, v, mask, dropout_p, softmax_scale)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    **_options: Any,
) -> torch.Tensor:
    """As `flash_attn_func`, over the first `cache_seqlens` entries of a cache.

    The cache is [B, Tmax, heads or fewer, D].

    Raises:
        BackendError: new keys to be written, a sliding window, or several queries at once.
    """
    _refuse_window(window_size)
    if k is not None or v is not None or q.shape[1] != 1:
        raise BackendError("flash_attn stand-in: only one query over a filled cache is supported")
    if cache_seqlens is None:
        return _attend(q, k_cache, v_cache, None, 0.0, softmax_scale)
    lengths = torch.as_tensor(cache_seqlens, device=q.device).reshape(-1)
    if len(lengths) == 1:  # what is not written yet is cut off, which costs less than a mask
        filled = int(lengths)
        return _attend(q, k_cache[:, :filled], v_cache[:, :filled], None, 0.0, softmax_scale)
    mask = torch.arange(k_cache.shape[1], device=q.device)[None] < lengths[:, None]
    return _attend(q, k_cache, v_cache, mask[:, None, None], 0.0, softmax_scale)


def flash_attn_varlen_func(*_arguments: Any, **_options: Any) -> torch.Tensor:
    """Raises: BackendError: always; local_chat has no padded batches."""
    raise BackendError(
        "flash_attn stand-in: padded batches are not supported; install flash-attn for them"
    )


def index_first_axis(*_arguments: Any, **_options: Any) -> torch.Tensor:
    """Raises: BackendError: always."""
    return flash_attn_varlen_func()


pad_input = unpad_input = index_first_axis


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _refuse_window(window: tuple[int, int]) -> None:
    if tuple(window) != (-1, -1):
        raise BackendError(
            "flash_attn stand-in: sliding windows are not supported; install flash-attn for them"
        )
