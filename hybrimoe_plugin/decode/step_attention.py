"""Attention of a single token on the CPU, cut where the KV cache is: graph, torch, graph."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from hybrimoe_plugin.compute.attention.attend import attend_latents
from hybrimoe_plugin.compute.cpu.ggml import Graph, GraphTensor, buffer
from hybrimoe_plugin.operators.attention import FusedAttention
from hybrimoe_plugin.operators.mla import FusedMLA


class StepAttention(Protocol):
    """Builds the parts of attention that go into the graphs before and after the KV cache."""

    def build_inputs(self, graph: Graph, x: GraphTensor, rope: GraphTensor) -> list[GraphTensor]:
        """What attention reads, queries and the new cache entry, from x [1, H].

        Args:
            rope: the rotation of the token's position as a matrix [D, D].
        """
        ...

    def attend(self, inputs: list[torch.Tensor], cache: Any) -> torch.Tensor:
        """What `build_output` reads, from the values of `build_inputs`. Mutates: the cache."""
        ...

    def build_output(self, graph: Graph, attended: GraphTensor) -> GraphTensor:
        """The output projection: [1, H]."""
        ...


class GroupedStep:
    """Attention with grouped queries. D is the width of a head.

    x [1, H] -- q_proj -- (q_norm) -- rope --> query [heads, D]
             -- k_proj -- (k_norm) -- rope --> key   [key heads, D]     to the cache
             -- v_proj ---------------------> value [1, key heads x D]  to the cache

    attended [1, heads x D] -- o_proj --> [1, H]
    """

    def __init__(self, attention: FusedAttention) -> None:
        self._attention = attention

    def build_inputs(self, graph: Graph, x: GraphTensor, rope: GraphTensor) -> list[GraphTensor]:
        attention = self._attention
        query = attention.q_proj.build(graph, x)
        key = attention.k_proj.build(graph, x)
        value = attention.v_proj.build(graph, x)
        query = self._by_head(graph, query)
        key = self._by_head(graph, key)
        if attention.normed:
            query = attention.q_norm.build(graph, query)
            key = attention.k_norm.build(graph, key)
        query = graph.matmul(rope, query, indexed=False)
        key = graph.matmul(rope, key, indexed=False)
        return [query, key, value]

    def attend(self, inputs: list[torch.Tensor], cache: Any) -> torch.Tensor:
        width = self._attention.head_dim
        query, key, value = (part.view(1, -1, 1, width) for part in inputs)
        attended = self._attention.attend(query, key, value, None, cache)
        return attended.view(1, -1)

    def build_output(self, graph: Graph, attended: GraphTensor) -> GraphTensor:
        output: GraphTensor = self._attention.o_proj.build(graph, attended)
        return output

    def _by_head(self, graph: Graph, node: GraphTensor) -> GraphTensor:
        """[heads, D] from [1, heads x D]."""
        by_head = node.value.view(-1, self._attention.head_dim)
        return graph.view(node, by_head)


class LatentStep:
    """DeepSeek's latent attention, absorbed (`compute.attention.kv_b`).

    x [1, H] -- q_proj, or q_a_proj -- q_a_layernorm -- q_b_proj --> for each head
                    | nope | rope |
                       |      +------ rope -------> query_rope   [heads, 1, rope]
                       +------------- W_uk^T -----> query_latent [heads, 1, latent]
             -- kv_a_proj_with_mqa --> | latent | rope |
                       |      +------ rope -------> entry [1, latent + rope]   to the cache
                       +-- kv_a_layernorm --------> its first part

    attended [heads, 1, latent] -- W_uv -- o_proj --> [1, H]
    """

    def __init__(self, attention: FusedMLA) -> None:
        assert attention.quantized_kv_b is not None, "take_kv_b() comes first"
        self._attention = attention
        self._kv_b = attention.quantized_kv_b

    def build_inputs(self, graph: Graph, x: GraphTensor, rope: GraphTensor) -> list[GraphTensor]:
        attention = self._attention
        query = self._build_query(graph, x)
        heads = query.value.view(attention.heads, 1, -1)
        query_nope = graph.view(query, heads[..., : attention.nope])
        query_rope = graph.view(query, heads[..., attention.nope :])

        compressed = attention.kv_a_proj_with_mqa.build(graph, x)
        latent = graph.view(compressed, compressed.value[:, : attention.latent])
        key_rope = graph.view(compressed, compressed.value[:, attention.latent :])

        # Two outputs write the entry for the cache, each a part of it. Outputs are computed in
        # their order, so the entry is whole behind the second one, which stands for all of it.
        entry = buffer(1, attention.latent + attention.rope_width)
        entry_latent = entry[:, : attention.latent]
        entry_rope = entry[:, attention.latent :]
        normed = attention.kv_a_layernorm.build(graph, latent, entry_latent)
        rotated = graph.matmul(rope, key_rope, entry_rope, indexed=False)
        whole_entry = rotated._replace(data=entry)

        query_latent = self._kv_b.build_into_latent(graph, query_nope)
        query_rope = graph.matmul(rope, query_rope, indexed=False)
        return [normed, whole_entry, query_latent, query_rope]

    def attend(self, inputs: list[torch.Tensor], cache: Any) -> torch.Tensor:
        attention = self._attention
        _, entry, *query_parts = inputs
        compressed = attention.cached(entry[None, None], cache)
        query = torch.cat(query_parts, dim=-1)[None]
        latents = attend_latents(query, compressed, None, attention.scaling, attention.latent)
        return latents[0]

    def build_output(self, graph: Graph, attended: GraphTensor) -> GraphTensor:
        values = self._kv_b.build_out_of_latent(graph, attended)
        flat = graph.view(values, values.value.view(1, -1))
        output: GraphTensor = self._attention.o_proj.build(graph, flat)
        return output

    def _build_query(self, graph: Graph, x: GraphTensor) -> GraphTensor:
        """[1, heads x (nope + rope)]."""
        attention = self._attention
        query: GraphTensor
        if attention.low_rank_query:
            low_rank = attention.q_a_proj.build(graph, x)
            normed = attention.q_a_layernorm.build(graph, low_rank)
            query = attention.q_b_proj.build(graph, normed)
        else:
            query = attention.q_proj.build(graph, x)
        return query


def step_attention(attention: FusedAttention | FusedMLA) -> StepAttention:
    """The parts of this attention, whose matrices are quantised."""
    if isinstance(attention, FusedMLA):
        return LatentStep(attention)
    return GroupedStep(attention)
