"""The base of attention operators, and attention with grouped queries (Llama, Mixtral, Qwen)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.attend import attend as attend_heads
from hybrimoe_plugin.compute.attention.decode_attention import AttentionShape, GQAShape
from hybrimoe_plugin.compute.attention.kv_cache import FixedCache, cache_in, use_growing_layer
from hybrimoe_plugin.compute.attention.rope import Rope, cos_sin, rotate_halves
from hybrimoe_plugin.compute.attention.sequences import attend_rows, rows_of
from hybrimoe_plugin.injection.moved import old_names
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.operators.linear import LinearGroup, keep_quantized
from hybrimoe_plugin.operators.norm import FusedRMSNorm

__getattr__ = old_names(__name__)


class AttentionOperator(DenseOperator):
    """Projections in one graph, what each kind of attention makes of them, the output projection.

    Attributes:
        layer_idx: the layer's number, under which the cache keeps its entries.
        scaling: factor of the scores.
        projections: what reads the hidden states.
    """

    by_proof = True
    projections: LinearGroup
    o_proj: Any

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **kwargs)
        self.layer_idx = int(orig_module.layer_idx)
        self.scaling = float(orig_module.scaling)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """([B, T, H], None) from [B, T, H].

        Args:
            position_embeddings: the model's cos and sin [B or 1, T, D], or complex ones.

        Mutates: the cache.
        """
        width = hidden_states.shape[-1]
        parts = self.projections(hidden_states.reshape(-1, width))
        cache = cache_in(kwargs)
        out = self.attend_parts(parts, hidden_states, position_embeddings, attention_mask, cache)
        return self.o_proj(out), None

    def attend_parts(
        self,
        parts: Sequence[torch.Tensor],
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """What the output projection reads, [B, T, heads x width], from what `projections` gave.

        Args:
            hidden_states: [B, T, H], of which only shape and type count.

        Mutates: the cache.
        """
        raise NotImplementedError

    def decode_shape(self, keys: torch.Tensor) -> AttentionShape:
        """The case of decoding over a fixed-address cache with these keys, or latents."""
        raise NotImplementedError


class FusedAttention(AttentionOperator):
    """Attention with one graph for Q, K and V, a cache that grows in place, and fused attention.

    Gives what the module that it replaces gives with `sdpa`; attention weights are not returned.

    Attributes:
        head_dim: D, the width of a head.
        query_heads: how many there are; `grouped` where they share fewer key heads.
        rope: the rotary embedding of queries and keys.
        normed: whether there are norms of each head, `q_norm` and `k_norm` (Qwen3).
    """

    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_norm: Any
    k_norm: Any

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **kwargs)
        self.head_dim = int(orig_module.head_dim)
        self.rope = Rope(rotate_halves, self.head_dim)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(orig_module, name)
            setattr(self, name, keep_quantized(self, name, linear))
        query_width = self.q_proj.out_features
        key_width = self.k_proj.out_features
        self.query_heads = query_width // self.head_dim
        self.grouped = self.query_heads * self.head_dim != key_width
        self.normed = hasattr(orig_module, "q_norm")
        if self.normed:
            for name in ("q_norm", "k_norm"):
                original = getattr(orig_module, name)
                norm = FusedRMSNorm(f"{key}.{name}", gguf_loader, config, original, **kwargs)
                setattr(self, name, norm)
        self.projections = LinearGroup(self.ggml, self, ("q_proj", "k_proj", "v_proj"))

    def decode_shape(self, keys: torch.Tensor) -> GQAShape:
        """The case of decoding over a fixed-address cache with these keys [1, heads, S, D]."""
        _, key_heads, capacity, width = keys.shape
        return GQAShape(self.query_heads, key_heads, width, capacity, keys.dtype, self.scaling)

    def attend_parts(
        self,
        parts: Sequence[torch.Tensor],
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """[B, T, heads x D] from Q, K and V; see the base."""
        batch, count, _ = hidden_states.shape
        dtype = hidden_states.dtype
        # Each [B, T, its heads, D].
        query, key, value = (part.view(batch, count, -1, self.head_dim) for part in parts)
        if self.normed:
            query = self.q_norm(query)
            key = self.k_norm(key)
        cos, sin = cos_sin(position_embeddings, self.head_dim // 2)
        # All heads are rotated at once: [B, query heads and then key heads, T, D].
        heads = torch.cat((query, key), dim=2).transpose(1, 2)
        heads = rotate_halves(heads, cos, sin).to(dtype)
        query = heads[:, : self.query_heads]
        key = heads[:, self.query_heads :]
        value = value.transpose(1, 2).to(dtype)
        out = self.attend(query, key, value, attention_mask, cache)
        # [B, heads, T, D] -> [B, T, heads x D]
        return out.transpose(1, 2).reshape(batch, count, -1)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """[B, heads, T, D] from new queries, keys and values [B, heads, T, D].

        Mutates: the cache.
        """
        rows = rows_of(cache, self.layer_idx)
        if rows is not None:
            return attend_rows(rows, query, key, value, self._attend_alone)
        if cache is not None:
            use_growing_layer(cache, self.layer_idx)
            key, value = cache.update(key, value, self.layer_idx)
        if isinstance(cache, FixedCache):
            return cache.kernel(query, key, value)
        return attend_heads(query, key, value, mask, self.scaling, self.grouped)

    def _attend_alone(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """One sequence's new tokens over all its keys and values."""
        return attend_heads(query, key, value, mask, self.scaling, self.grouped)
