"""Attention with grouped queries (Llama, Mixtral, Qwen) in few operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.attend import attend
from hybrimoe_plugin.compute.attention.flashinfer_gqa import Shape
from hybrimoe_plugin.compute.attention.kv_cache import FixedCache, growing
from hybrimoe_plugin.compute.cpu.ggml import Graph, GraphTensor
from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.injection.moved import old_names
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.operators.linear import LinearGroup, as_stored
from hybrimoe_plugin.operators.norm import FusedRMSNorm

__getattr__ = old_names(__name__)

Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Rotary embedding of x [..., D] by cos and sin [..., D / 2]."""


class FusedAttention(DenseOperator):
    """The model's attention with one graph for Q, K and V, a cache that grows in place, and torch's
    fused attention.

    Gives what the module it replaces gives with `sdpa`; attention weights are not returned.
    """

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any

    def __init__(
        self, key: str, gguf_loader: Any, config: Any, orig_module: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **kwargs)
        self.layer_idx = int(orig_module.layer_idx)
        self.head_dim = int(orig_module.head_dim)
        self.scaling = float(orig_module.scaling)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, as_stored(self, name, getattr(orig_module, name)))
        self.query_heads = self.q_proj.out_features // self.head_dim
        self.grouped = self.query_heads * self.head_dim != self.k_proj.out_features
        for name in ("q_norm", "k_norm") if hasattr(orig_module, "q_norm") else ():
            setattr(
                self,
                name,
                FusedRMSNorm(
                    f"{key}.{name}", gguf_loader, config, getattr(orig_module, name), **kwargs
                ),
            )
        self._projections = LinearGroup(self.ggml, self, ("q_proj", "k_proj", "v_proj"))

    def decode_shape(self, keys: torch.Tensor) -> Shape:
        """What decoding over a cache of fixed place looks like whose keys [1, heads, S, D] are
        given.
        """
        return Shape(
            self.query_heads, keys.shape[1], keys.shape[3], keys.shape[2], keys.dtype, self.scaling
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """([B, T, H], None) from [B, T, H] and the model's cos and sin [B or 1, T, D]. Mutates: the
        cache.
        """
        batch, count, width = hidden_states.shape
        dtype = hidden_states.dtype
        parts = self._projections(hidden_states.reshape(-1, width))
        query, key, value = (part.view(batch, count, -1, self.head_dim) for part in parts)
        if "q_norm" in self._modules:
            query, key = self.q_norm(query), self.k_norm(key)
        cos, sin = angles(position_embeddings, self.head_dim // 2)
        turned = rotate(torch.cat((query, key), dim=2).transpose(1, 2), cos, sin).to(
            dtype
        )  # all heads at once
        query, key = turned[:, : self.query_heads], turned[:, self.query_heads :]
        value = value.transpose(1, 2).to(dtype)
        out = self._attended(
            query, key, value, attention_mask, cache if cache is not None else past_key_values
        )
        out = self.o_proj(out.transpose(1, 2).reshape(batch, count, -1))
        return out, None

    def _attended(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """[B, heads, T, D] from new queries, keys and values [B, heads, T, D]. Mutates:
        the cache.
        """
        if cache is not None:
            growing(cache, self.layer_idx)
            key, value = cache.update(key, value, self.layer_idx)
        if isinstance(cache, FixedCache) and cache.kernel is not None:
            return cache.kernel(query, key, value)
        return attend(query, key, value, mask, self.scaling, self.grouped)

    # One token in two graphs (`row_step`).

    @property
    def turn(self) -> tuple[Turn, int]:
        return rotate, self.head_dim

    def before(self, graph: Graph, x: GraphTensor, turned: GraphTensor) -> list[GraphTensor]:
        query, key, value = (
            linear.build(graph, x) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (graph.view(part, part.value.view(-1, self.head_dim)) for part in (query, key))
        if "q_norm" in self._modules:
            query, key = self.q_norm.build(graph, query), self.k_norm.build(graph, key)
        return [
            graph.matmul(turned, query, indexed=False),
            graph.matmul(turned, key, indexed=False),
            value,
        ]

    def between(self, parts: list[torch.Tensor], cache: Any) -> torch.Tensor:
        query, key, value = (part.view(1, -1, 1, self.head_dim) for part in parts)
        return self._attended(query, key, value, None, cache).view(1, -1)

    def after(self, graph: Graph, attended: GraphTensor) -> GraphTensor:
        return self.o_proj.build(graph, attended)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [..., D] whose two halves are the pairs; cos and sin [..., D / 2]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def angles(embeddings: Any, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B or 1, 1, T, D / 2] from what the model's rotary module gives.

    Raises:
        InputError: they are of other dimensions, since the positions were.
    """
    given = embeddings if isinstance(embeddings, torch.Tensor) else embeddings[0]
    if given.ndim != 3:
        raise InputError(
            f"position_ids must be [batch, tokens], they gave angles {list(given.shape)}"
        )
    if isinstance(embeddings, torch.Tensor):  # DeepSeek-V2: complex numbers
        return embeddings.real[:, None], embeddings.imag[:, None]
    cos, sin = embeddings
    return cos[:, None, :, :half], sin[:, None, :, :half]


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same for neighbouring pairs, which come out as halves: a dot product of two such is the
    same.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
