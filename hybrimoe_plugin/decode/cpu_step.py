"""One token through a decoder layer on the CPU in two ggml graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.compute.attention.rope import Rope
from hybrimoe_plugin.compute.cpu.ggml import Graph, GraphTensor, buffer
from hybrimoe_plugin.compute.cpu.ggml_function import GgmlFunction
from hybrimoe_plugin.decode.rope_matrix import RopeMatrix
from hybrimoe_plugin.decode.step_attention import step_attention
from hybrimoe_plugin.families.family import LayerForm
from hybrimoe_plugin.operators.attention import FusedAttention
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.linear import GgmlLinear
from hybrimoe_plugin.operators.mla import FusedMLA
from hybrimoe_plugin.operators.mlp import FusedMLP
from hybrimoe_plugin.operators.norm import FusedRMSNorm


class CpuStep:
    """A layer's call for one token [1, 1, H] float32; gives what the layer gives.

    On the CPU a small operation costs more than its arithmetic. So everything around attention that
    needs no decision is two graphs, where the modules would be some twenty calls:

        graph 1   x -- input_layernorm -- projections -- RoPE --> queries, new cache entry
        torch          append to the KV cache, attend over it --> attended
        graph 2   attended -- output projection -- + x --> total
                  total -- post_attention_layernorm --> normed
                  normed -- dense MLP or shared experts, if there are any --> dense
        modules   normed -- router, routed experts --> output
        torch     output + dense + total

    Router and experts are called as modules, with their hooks. A layer without them ends with
    dense + total.

    Args:
        layer: x + attention(norm(x)), and then x + mlp(norm(x)).
        dense: its MLP, or the shared experts of its MLP, if it has any.
        rope: the rotation of the running step's position.
    """

    def __init__(self, layer: Any, dense: FusedMLP | None, rope: RopeMatrix) -> None:
        ggml = layer.self_attn.ggml
        assert ggml is not None, "cpu_step() has checked it"
        self._attention = step_attention(layer.self_attn)
        self._input_norm: FusedRMSNorm = layer.input_layernorm
        self._mlp_norm: FusedRMSNorm = layer.post_attention_layernorm

        mlp = layer.mlp
        self._dense = dense
        self._dense_gate: nn.Module | None = getattr(mlp, "shared_expert_gate", None)
        self._router: nn.Module | None = getattr(mlp, "gate", None)
        self._experts: HybriMoEExperts | None = getattr(mlp, "experts", None)

        width = len(self._input_norm.weight)
        self._x = buffer(1, width)
        """[1, H]: the layer's input, which both graphs read."""
        self._rope = rope
        self._before = GgmlFunction(ggml, self._build_before, single_input=self._x)
        self._after = GgmlFunction(ggml, self._build_after)

    def __call__(self, hidden: torch.Tensor, embeddings: Any, cache: Any) -> torch.Tensor:
        """[1, 1, H]. Mutates: the cache."""
        self._rope.set_step(embeddings)
        inputs = self._before(hidden[0], 1)
        attended = self._attention.attend(inputs, cache)
        total, normed, *dense = self._after(attended, 1)
        if self._router is None or self._experts is None:
            output = dense[0]
        else:
            normed = normed.clone()  # hooks may keep it
            _, weights, ids = self._router(normed)
            output = self._experts(normed, ids, weights)
            if dense:
                output = output + self._gated(normed, dense[0])
        output = output + total
        return output[None]

    def _gated(self, normed: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """Qwen2-MoE scales its shared experts by a gate of their own."""
        if self._dense_gate is None:
            return dense
        scale: torch.Tensor = self._dense_gate(normed).sigmoid()
        return scale * dense

    def _build_before(self, graph: Graph, x: GraphTensor) -> list[GraphTensor]:
        normed = self._input_norm.build(graph, x)
        rope = graph.wrap(self._rope.matrix)
        return self._attention.build_inputs(graph, normed, rope)

    def _build_after(self, graph: Graph, attended: GraphTensor) -> list[GraphTensor]:
        x = graph.wrap(self._x)
        attention = self._attention.build_output(graph, attended)
        total = graph.add(attention, x)
        normed = self._mlp_norm.build(graph, total)
        outputs = [total, normed]
        if self._dense is not None:
            outputs.append(self._dense.build(graph, normed))
        return outputs


def cpu_step(layer: Any, form: LayerForm | None, ropes: dict[Rope, RopeMatrix]) -> CpuStep | None:
    """A decoder layer's step; None for layers of another form, or with matrices not quantised here.

    Args:
        form: of the layers of the model's family.
        ropes: shared by the layers of a model; what is missing is added.

    Mutates: `ropes`.
    """
    if form is not LayerForm.MOE or not isinstance(layer.self_attn, FusedAttention | FusedMLA):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    dense = mlp
    if isinstance(getattr(mlp, "experts", None), HybriMoEExperts):
        if getattr(mlp, "jitter_noise", 0):  # only while Mixtral trains
            return None
        dense = getattr(mlp, "shared_experts", None) or getattr(mlp, "shared_expert", None)
    parts = [*attention.children(), layer.input_layernorm, layer.post_attention_layernorm]
    if dense is not None:
        parts.append(dense)
    if not all(_has_graph(part) for part in parts):
        return None
    rope = attention.rope
    if rope not in ropes:
        ropes[rope] = RopeMatrix(rope)
    return CpuStep(layer, dense, ropes[rope])


def _has_graph(module: Any) -> bool:
    """Whether a module can be built into a ggml graph."""
    if isinstance(module, GgmlLinear):
        return True
    return isinstance(module, FusedRMSNorm | FusedMLP) and module.ggml is not None
