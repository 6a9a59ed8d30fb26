"""Attention of a single token on the CPU, cut where the KV cache is: graph, torch, graph."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from hybrimoe_plugin.compute.cpu.ggml import GraphTensor, buffer
from hybrimoe_plugin.compute.cpu.native.graph import AnyGraph, NativeGraph
from hybrimoe_plugin.compute.cpu.native.token_attention import AttendedCache
from hybrimoe_plugin.decode.on_cpu.rope_matrix import RopeMatrix
from hybrimoe_plugin.operators.attention import FusedAttention
from hybrimoe_plugin.operators.mla import FusedMLA


class StepAttention(Protocol):
    """Builds the parts of attention that go into the graphs before and after the KV cache."""

    def build_inputs(self, graph: AnyGraph, x: GraphTensor, rope: RopeMatrix) -> list[GraphTensor]:
        """What attention reads, queries and the new cache entry, from x [1, H].

        Args:
            rope: the rotation of the token's position.
        """
        ...

    def attend(self, inputs: list[torch.Tensor], cache: Any) -> torch.Tensor:
        """What `build_output` reads, from the values of `build_inputs`. Mutates: the cache."""
        ...

    def build_attention(
        self, graph: NativeGraph, x: GraphTensor, rope: RopeMatrix
    ) -> tuple[GraphTensor, AttendedCache]:
        """All of it in one graph: what `build_output` reads, from x [1, H]."""
        ...

    def build_output(self, graph: AnyGraph, attended: GraphTensor) -> GraphTensor:
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

    def build_inputs(self, graph: AnyGraph, x: GraphTensor, rope: RopeMatrix) -> list[GraphTensor]:
        """Query [heads, D], key [key heads, D] and value [1, key heads x D]."""
        attention = self._attention
        query = attention.q_proj.build(graph, x)
        key = attention.k_proj.build(graph, x)
        value = attention.v_proj.build(graph, x)

        # Norms and rotation are of each head. The value is left as it is.
        query = self._by_head(graph, query)
        key = self._by_head(graph, key)
        if attention.normed:
            query = attention.q_norm.build(graph, query)
            key = attention.k_norm.build(graph, key)
        query = rope.build(graph, query)
        key = rope.build(graph, key)
        return [query, key, value]

    def attend(self, inputs: list[torch.Tensor], cache: Any) -> torch.Tensor:
        """[1, heads x D]."""
        width = self._attention.head_dim
        query, key, value = (part.view(1, -1, 1, width) for part in inputs)
        attended = self._attention.attend(query, key, value, None, cache)
        return attended.view(1, -1)

    def build_attention(
        self, graph: NativeGraph, x: GraphTensor, rope: RopeMatrix
    ) -> tuple[GraphTensor, AttendedCache]:
        """[1, heads x D]."""
        attention = self._attention
        query, key, value = self.build_inputs(graph, x, rope)
        width = attention.head_dim
        attended, cache = graph.attend(
            query.value, key, value, key.shape[0], width, attention.scaling
        )
        return graph.view(attended, attended.value.view(1, -1)), cache

    def build_output(self, graph: AnyGraph, attended: GraphTensor) -> GraphTensor:
        """[1, H]."""
        output: GraphTensor = self._attention.o_proj.build(graph, attended)
        return output

    def _by_head(self, graph: AnyGraph, node: GraphTensor) -> GraphTensor:
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

    def build_inputs(self, graph: AnyGraph, x: GraphTensor, rope: RopeMatrix) -> list[GraphTensor]:
        """As drawn above; the normed latent comes before the entry, which contains it."""
        normed, entry = self._build_entry(graph, x, rope)
        query_latent, query_rope = self._build_absorbed_query(graph, x, rope)
        return [normed, entry, query_latent, query_rope]

    def attend(self, inputs: list[torch.Tensor], cache: Any) -> torch.Tensor:
        """[heads, 1, latent]."""
        attention = self._attention
        _, entry, query_latent, query_rope = inputs
        # All entries so far, [1, 1, C, latent + rope], and the query to go with them.
        compressed = attention.cached(entry[None, None], cache)
        query = torch.cat((query_latent, query_rope), dim=-1)
        query = query[None]
        latents = attention.attend_absorbed(query, compressed, None, cache)
        return latents[0]

    def build_attention(
        self, graph: NativeGraph, x: GraphTensor, rope: RopeMatrix
    ) -> tuple[GraphTensor, AttendedCache]:
        """[heads, 1, latent]."""
        attention = self._attention
        query = buffer(attention.heads, attention.latent + attention.rope_width)
        _, entry = self._build_entry(graph, x, rope)
        self._build_absorbed_query(graph, x, rope, query)
        latents, cache = graph.attend(query, entry, None, 1, attention.latent, attention.scaling)
        return graph.view(latents, latents.value[:, None]), cache

    def build_output(self, graph: AnyGraph, attended: GraphTensor) -> GraphTensor:
        """[1, H]."""
        by_head = self._kv_b.build_out_of_latent(graph, attended)
        flat = by_head.value.view(1, -1)
        values = graph.view(by_head, flat)
        output: GraphTensor = self._attention.o_proj.build(graph, values)
        return output

    def _build_entry(
        self, graph: AnyGraph, x: GraphTensor, rope: RopeMatrix
    ) -> tuple[GraphTensor, GraphTensor]:
        """(the normed latent, the entry for the cache, of which it is the first part).

        Each of the two outputs writes its part of the entry. Outputs are computed in their order,
        so the entry is whole behind the second one, which stands for all of it.
        """
        attention = self._attention
        width = attention.latent
        entry = buffer(1, width + attention.rope_width)
        entry_latent = entry[:, :width]
        entry_rope = entry[:, width:]

        compressed = attention.kv_a_proj_with_mqa.build(graph, x)
        values = compressed.value
        latent = graph.view(compressed, values[:, :width])
        key_rope = graph.view(compressed, values[:, width:])

        normed = attention.kv_a_layernorm.build(graph, latent, entry_latent)
        rotated = rope.build(graph, key_rope, entry_rope)
        whole_entry = rotated._replace(data=entry)
        return normed, whole_entry

    def _build_absorbed_query(
        self, graph: AnyGraph, x: GraphTensor, rope: RopeMatrix, out: torch.Tensor | None = None
    ) -> tuple[GraphTensor, GraphTensor]:
        """(the part for latents [heads, 1, latent], the rotary part [heads, 1, rope]).

        Args:
            out: [heads, latent + rope], where both go.
        """
        out_latent = out_rope = None
        if out is not None:
            latent = self._attention.latent
            out_latent, out_rope = out[:, None, :latent], out[:, None, latent:]
        heads = self._attention.heads
        nope = self._attention.nope
        query = self._build_query(graph, x)
        by_head = query.value.view(heads, 1, -1)

        # W_uk^T is applied to the part without positions.
        query_nope = graph.view(query, by_head[..., :nope])
        query_latent = self._kv_b.build_into_latent(graph, query_nope, out_latent)

        # The rotation by the position is applied to the other part.
        query_rope = graph.view(query, by_head[..., nope:])
        rotated = rope.build(graph, query_rope, out_rope)
        return query_latent, rotated

    def _build_query(self, graph: AnyGraph, x: GraphTensor) -> GraphTensor:
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
