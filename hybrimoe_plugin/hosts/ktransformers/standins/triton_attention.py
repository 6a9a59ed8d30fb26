"""`ktransformers.operators.triton_attention` in torch.

One decode step of latent attention over a paged cache.
"""

from __future__ import annotations

import torch


def decode_attention_fwd_grouped(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    o: torch.Tensor,
    req_to_token: torch.Tensor,
    b_seq_len: torch.Tensor,
    attn_logits: torch.Tensor,
    num_kv_splits: int,
    sm_scale: float,
    page_size: int,
    logit_cap: float = 0.0,
) -> None:
    """Attend with one query each.

    Args:
        q: [B, heads, R + P], queries in the latent space and their rotary part.
        k_buffer: [pages, page size, 1, R + P].
        v_buffer: [pages, page size, 1, R].
        o: [B, 1, heads, R]. Mutates.
        req_to_token: [B, pages] int, the pages of each sequence.
        b_seq_len: [B] int, filled length of each sequence.
        attn_logits, num_kv_splits: work space of the kernel, unused.
        logit_cap: scores are squashed to this by tanh where it is positive.
    """
    for row in range(q.shape[0]):
        length = int(b_seq_len[row])
        pages = req_to_token[row, : (length + page_size - 1) // page_size].to(torch.int64)
        keys = k_buffer[pages].reshape(-1, k_buffer.shape[-1])[:length]
        values = v_buffer[pages].reshape(-1, v_buffer.shape[-1])[:length]
        scores = (q[row] @ keys.T).float() * sm_scale
        if logit_cap > 0:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        o[row].copy_((scores.softmax(dim=-1).to(values.dtype) @ values).reshape(o[row].shape))
