"""DeepSeek's latent attention, whose cache holds latents in place of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.attend import attend, attend_latents
from hybrimoe_plugin.compute.attention.decode_attention import MLAShape
from hybrimoe_plugin.compute.attention.kv_b import AbsorbedKVB, DenseKVB, QuantizedKVB
from hybrimoe_plugin.compute.attention.kv_cache import FixedCache, use_growing_layer
from hybrimoe_plugin.compute.attention.rope import (
    Rope,
    RotaryFunction,
    cos_sin,
    rotate_halves,
    rotate_interleaved,
)
from hybrimoe_plugin.compute.attention.sequences import attend_rows, rows_of
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.injection.moved import old_names
from hybrimoe_plugin.operators.attention import AttentionOperator
from hybrimoe_plugin.operators.linear import LinearGroup, keep_quantized
from hybrimoe_plugin.operators.norm import FusedRMSNorm
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

__getattr__ = old_names(__name__)


class FusedMLA(AttentionOperator):
    """Multi-head latent attention; absorbed for quantised matrices, and for one token in any case.

    transformers expands keys and values of the whole context at every step. Absorbed (DeepSeek-V2,
    section 2.1; drawn in `compute.attention.kv_b`), W_uk is applied to the query and W_uv to the
    result, so a step reads the cached latents and expands none of them. The cache has one entry for
    each token,

        compressed [latent + rope]  =  | normed latent | rotary part of the key |

    and a head's query is

        query [nope + rope]         =  | part without positions | rotary part |

    Attributes:
        heads: number of heads.
        latent: width of a latent (`kv_lora_rank`).
        values: width of a head's value (`v_head_dim`).
        nope: width of the part of queries and keys without positions (`qk_nope_head_dim`).
        rope_width: width of their rotary part (`qk_rope_head_dim`).
        rope: the rotary embedding of those parts.
        low_rank_query: whether queries come through a latent of their own, `q_a_proj`.
        quantized_kv_b: kv_b as stored; None where the model's own linear is used.
    """

    keeps_latents = True
    q_b_proj: Any
    q_a_layernorm: Any
    kv_a_layernorm: Any
    q_proj: Any
    q_a_proj: Any
    kv_a_proj_with_mqa: Any

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **kwargs)
        self.heads = int(orig_module.num_heads)
        self.latent = int(orig_module.kv_lora_rank)
        self.values = int(orig_module.v_head_dim)
        self.nope = int(orig_module.qk_nope_head_dim)
        self.rope_width = int(orig_module.qk_rope_head_dim)
        self.rope = Rope(_rotary_function(config), self.rope_width)

        self.low_rank_query = orig_module.q_lora_rank is not None
        if self.low_rank_query:
            queries = ["q_a_proj", "q_b_proj"]
            norms = ["q_a_layernorm", "kv_a_layernorm"]
        else:
            queries = ["q_proj"]
            norms = ["kv_a_layernorm"]
        for name in (*queries, "kv_a_proj_with_mqa", "o_proj"):
            linear = getattr(orig_module, name)
            setattr(self, name, keep_quantized(self, name, linear))
        for name in norms:
            original = getattr(orig_module, name)
            norm = FusedRMSNorm(f"{key}.{name}", gguf_loader, config, original, **kwargs)
            setattr(self, name, norm)
        self.projections = LinearGroup(self.ggml, self, (queries[0], "kv_a_proj_with_mqa"))

        self.quantized_kv_b: QuantizedKVB | None = None
        self._dense_kv_b: DenseKVB | None = None
        if self.ggml is None:
            self.kv_b_proj = orig_module.kv_b_proj
            self._dense_kv_b = DenseKVB(self, self.heads, self.nope)

    def take_kv_b(self, w_uk: QuantizedMatrix, w_uv: QuantizedMatrix) -> None:
        """Take the two parts of kv_b: W_uk transposed [heads, latent, nope], and W_uv [heads,
        values, latent].

        Raises:
            BackendError: another shape, or a type without a kernel.
        """
        wanted = (self.heads, self.latent, self.nope), (self.heads, self.values, self.latent)
        found = w_uk.shape, w_uv.shape
        if found != wanted:
            raise BackendError(f"{self.key}: expected kv_b as {wanted}, found {found}")
        assert self.ggml is not None
        self.quantized_kv_b = QuantizedKVB(self.ggml, w_uk, w_uv)

    def decode_shape(self, compressed: torch.Tensor) -> MLAShape:
        """The case of decoding over a fixed-address cache [1, 1, S, latent + rope]."""
        return MLAShape(
            self.heads,
            self.latent,
            self.rope_width,
            compressed.shape[2],
            compressed.dtype,
            self.scaling,
        )

    def attend_parts(
        self,
        parts: Sequence[torch.Tensor],
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """[B, T, heads x values] from queries, or their latents, and new entries; see the base."""
        batch, count, _ = hidden_states.shape
        dtype = hidden_states.dtype
        query, compressed = (part.to(dtype) for part in parts)
        if self.low_rank_query:
            query = self.q_b_proj(self.q_a_layernorm(query))
        # [B, heads, T, nope + rope] and [B, 1, T, latent + rope]
        query = query.view(batch, count, self.heads, -1).transpose(1, 2)
        compressed = compressed.view(batch, 1, count, -1)
        query_nope, query_rope = query.split((self.nope, self.rope_width), dim=-1)
        latent, key_rope = compressed.split((self.latent, self.rope_width), dim=-1)

        # All heads are rotated at once: those of the query, and the one that keys share.
        cos, sin = cos_sin(position_embeddings, self.rope_width // 2)
        heads = torch.cat((query_rope, key_rope), dim=1)
        heads = self.rope.rotate(heads, cos, sin).to(query.dtype)
        query_rope = heads[:, :-1]
        key_rope = heads[:, -1:]

        # The entries of the new tokens, and then of all so far.
        compressed = torch.cat((self.kv_a_layernorm(latent), key_rope), dim=-1)
        compressed = self.cached(compressed, cache)
        alone = rows_of(cache, self.layer_idx) is None
        if self._dense_kv_b is not None and count > 1 and alone:
            query = torch.cat((query_nope, query_rope), dim=-1)
            out = self._attend_expanded(self._dense_kv_b, query, compressed, attention_mask)
        else:
            kv_b = self._kv_b()
            query = torch.cat((kv_b.into_latent(query_nope), query_rope), dim=-1)
            latents = self.attend_absorbed(query, compressed, attention_mask, cache)
            out = kv_b.out_of_latent(latents)
        # [B, heads, T, values] -> [B, T, heads x values]
        return out.transpose(1, 2).reshape(batch, count, -1)

    def cached(self, compressed: torch.Tensor, cache: Any) -> torch.Tensor:
        """Append entries [B, 1, T, latent + rope] and return those of all tokens so far.

        Mutates: the cache.
        """
        if cache is None or rows_of(cache, self.layer_idx) is not None:
            return compressed  # rows are appended where they attend
        use_growing_layer(cache, self.layer_idx)
        no_values = compressed[..., :0]
        everything, _ = cache.update(compressed, no_values, self.layer_idx)
        return everything

    def _kv_b(self) -> AbsorbedKVB:
        kv_b = self.quantized_kv_b or self._dense_kv_b
        assert kv_b is not None, "take_kv_b() comes first"
        return kv_b

    def attend_absorbed(
        self,
        query: torch.Tensor,
        compressed: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """[B, heads, T, latent] from queries [B, heads, T, latent + rope]."""
        if isinstance(cache, FixedCache):
            return cache.kernel(query, compressed)
        rows = rows_of(cache, self.layer_idx)
        if rows is not None:
            no_values = compressed[..., :0]
            return attend_rows(rows, query, compressed, no_values, self._attend_alone)
        return attend_latents(query, compressed, mask, self.scaling, self.latent)

    def _attend_alone(
        self,
        query: torch.Tensor,
        compressed: torch.Tensor,
        _no_values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """One sequence's new tokens over all its entries."""
        return attend_latents(query, compressed, mask, self.scaling, self.latent)

    def _attend_expanded(
        self,
        kv_b: DenseKVB,
        query: torch.Tensor,
        compressed: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """[B, heads, T, values] with keys and values of the whole context written out."""
        latent, key_rope = compressed.split((self.latent, self.rope_width), dim=-1)
        key_nope, values = kv_b.expand(latent[:, 0])
        key_rope = key_rope.expand(-1, self.heads, -1, -1)
        keys = torch.cat((key_nope, key_rope), dim=-1)
        return attend(query, keys, values, mask, self.scaling, grouped=False)


def _rotary_function(config: Any) -> RotaryFunction:
    """DeepSeek-V3's config says which pairs are rotated; transformers' V2 does not look at it."""
    says = hasattr(type(config), "rope_interleave")
    if says and not config.rope_interleave:
        return rotate_halves
    return rotate_interleaved
