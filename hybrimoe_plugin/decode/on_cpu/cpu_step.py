"""A few tokens through a decoder layer on the CPU in two ggml graphs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.compute.attention.rope import Rope
from hybrimoe_plugin.compute.cpu.ggml import GraphTensor, buffer
from hybrimoe_plugin.compute.cpu.ggml_function import GgmlFunction
from hybrimoe_plugin.compute.cpu.native.choice import kernels_of, takes
from hybrimoe_plugin.compute.cpu.native.graph import AnyGraph, NativeGraph
from hybrimoe_plugin.compute.cpu.native.token_attention import AttendedCache
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.decode.on_cpu.lazy_chain import ChainLink
from hybrimoe_plugin.decode.on_cpu.native_step import NativeStep
from hybrimoe_plugin.decode.on_cpu.rope_matrix import RopeMatrix
from hybrimoe_plugin.decode.on_cpu.routed_part import RoutedPart, routed_part
from hybrimoe_plugin.decode.on_cpu.step_attention import step_attention
from hybrimoe_plugin.operators.attention import FusedAttention
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.linear import GgmlLinear
from hybrimoe_plugin.operators.mla import FusedMLA
from hybrimoe_plugin.operators.mlp import FusedMLP
from hybrimoe_plugin.operators.norm import FusedRMSNorm
from hybrimoe_plugin.policy.step import FEW_ROWS


class CpuStep:
    """A layer's call for a few tokens [B, T, H] float32; gives what the layer gives.

    On the CPU a small operation costs more than its arithmetic. So everything around attention that
    needs no decision is two graphs, where the modules would be some twenty calls:

        graph 1   x -- norm -- projections -- RoPE --> queries, new cache entry
        torch          append to the KV cache, attend over it --> attended
        graph 2   attended -- output projection -- + x --> total
                  total -- norm --> normed
                  normed -- dense MLP or shared experts, if there are any --> dense
        modules   normed -- router, routed experts --> output
        torch     output + dense + total

    That is for one token. With several, each has a position of its own, and what lies between the
    projections and the output projection is torch's, as the attention operator has it.

    Router and experts are called as modules, with their hooks, and so is a whole block of experts
    that is of another form. A layer without experts ends with dense + total.

    Args:
        layer: x + a attention(norm(x)), and then x + b mlp(norm(x)), as its glue says.
        dense: its MLP, or the shared experts of its MLP, if it has any.
        rope: the rotation of the running step's position.

    Attributes:
        called: beginnings of the names of modules that are called with all their hooks.
        kernels: the compiled operations; None without them.
        link: computes the layer as a whole, with others; None where it cannot.
    """

    def __init__(self, layer: GraphedLayer, dense: FusedMLP | None, rope: RopeMatrix) -> None:
        glue, block = layer.glue, layer.block
        assert glue is not None, "cpu_step() has checked it"
        attention = getattr(layer, glue.attention)
        ggml = attention.ggml
        self._operator = attention
        self._attention = step_attention(attention)
        self._attention_scale = glue.attention_scale
        self._input_norm: FusedRMSNorm = getattr(layer, glue.input_norm)
        self._mlp_norm: FusedRMSNorm = getattr(layer, glue.mlp_norm)

        mlp = getattr(layer, glue.mlp)
        self._mlp = mlp
        self._mlp_scale = glue.mlp_scale
        self._dense = dense
        self._dense_gate: nn.Module | None = None
        self._router: nn.Module | None = None
        self._experts: HybriMoEExperts | None = None
        self.called: tuple[str, ...] = () if dense is mlp else (f"{glue.mlp}.",)
        if block is not None:
            self._router = getattr(mlp, block.router)
            self._experts = mlp.experts
            if block.shared_gate is not None:
                self._dense_gate = getattr(mlp, block.shared_gate)
            self.called = tuple(f"{glue.mlp}.{name}." for name in (block.router, "experts"))

        width = len(self._input_norm.weight)
        self.link: ChainLink | None = None
        self._x = buffer(FEW_ROWS, width)
        """[FEW_ROWS, H]: the layer's input, whose first rows both graphs read."""
        self._rope = rope
        self._before = GgmlFunction(ggml, self._build_before, input_rows=self._x)
        self._after = GgmlFunction(ggml, self._build_after)
        self._rows_before = GgmlFunction(ggml, self._build_rows_before, input_rows=self._x)
        self._rows_after = GgmlFunction(ggml, self._build_rows_after)
        self._native: NativeStep | None = None
        self._routed: RoutedPart | None = None
        self._out = buffer(1, width)
        self.kernels = kernels_of(ggml)
        if self.kernels is not None and glue.attention_scale == 1:
            number = attention.layer_idx
            self._native = NativeStep(ggml, number, self._x[:1], self._build_native)
            if self._can_be_whole():
                whole = NativeStep(ggml, number, buffer(1, width), self._build_whole)
                self.link = ChainLink(whole, rope, self._routed, self._out)

    def __call__(self, hidden: torch.Tensor, embeddings: Any, cache: Any) -> torch.Tensor:
        """[1, 1, H]. Mutates: the cache."""
        if self.link is not None:
            output = self.link(hidden, embeddings, cache)
            if output is not None:
                return output
        self._rope.set_step(embeddings)
        if self._native is not None:
            outputs = self._native(hidden, cache)
            if outputs is not None:
                return self._output(outputs, hidden.shape)
        inputs = self._before(hidden[0], 1)
        attended = self._attention.attend(inputs, cache)
        if self._attention_scale != 1:
            attended = attended * self._attention_scale  # the projection behind it is linear
        return self._output(self._after(attended, 1), hidden.shape)

    def rows(
        self, hidden: torch.Tensor, embeddings: Any, mask: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        """[B, T, H] of several tokens, at most `FEW_ROWS` in all. Mutates: the cache.

        Args:
            mask: as attention takes it; None for causal attention.
        """
        count = hidden.shape[0] * hidden.shape[1]
        parts = self._rows_before(hidden.reshape(count, -1), count)
        attended = self._operator.attend_parts(parts, hidden, embeddings, mask, cache)
        if self._attention_scale != 1:
            attended = attended * self._attention_scale  # the projection behind it is linear
        outputs = self._rows_after(attended.view(count, -1), count)
        return self._output(outputs, hidden.shape)

    def many(
        self, hidden: torch.Tensor, embeddings: Any, mask: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        """As `rows`, for as many tokens as a prompt has, with graphs that are built for the call.

        Only where `takes_many` says so.
        """
        assert self.kernels is not None
        threads = torch.get_num_threads()
        flat = hidden.reshape(hidden.shape[0] * hidden.shape[1], -1)
        graph = NativeGraph(self._operator.ggml, self.kernels, threads)
        built = self._build_rows_before(graph, graph.wrap(flat))
        graph.finish()
        graph.run()
        parts = [part.value for part in built]
        attended = self._operator.attend_parts(parts, hidden, embeddings, mask, cache)
        if self._attention_scale != 1:
            attended = attended * self._attention_scale  # the projection behind it is linear
        graph = NativeGraph(self._operator.ggml, self.kernels, threads)
        x, flat_attended = graph.wrap(flat), graph.wrap(attended.reshape(len(flat), -1))
        attention = self._operator.o_proj.build(graph, flat_attended)
        built = self._build_behind(graph, attention, x)
        graph.finish()
        graph.run()
        return self._output([part.value for part in built], hidden.shape)

    def takes_many(self, hidden: torch.Tensor) -> bool:
        """Whether products of so many rows go by tiles, for [B, T, H]."""
        tokens = hidden.shape[0] * hidden.shape[1]
        return takes(self.kernels, tokens) and hidden.is_contiguous() and self._tiled

    @functools.cached_property
    def _tiled(self) -> bool:
        """Whether tiles take all matrices; known once these are loaded."""
        kernels = self.kernels
        parts = [self._operator] if self._dense is None else [self._operator, self._dense]
        modules = [module for part in parts for module in part.modules()]
        stored = [module.stored for module in modules if isinstance(module, GgmlLinear)]
        return kernels is not None and all(
            matrix is not None and kernels.can_tile(matrix.type_name, matrix.shape[-1])
            for matrix in stored
        )

    def _output(self, outputs: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
        """[B, T, H] from the outputs of the second graph."""
        total, normed, *dense = outputs
        output = self._mlp_output(normed, dense, shape)
        if self._mlp_scale != 1:
            output = output * self._mlp_scale
        output = output + total
        return output.view(shape)

    def _mlp_output(
        self, normed: torch.Tensor, dense: list[torch.Tensor], shape: torch.Size
    ) -> torch.Tensor:
        """[R, H] of the layer's MLP or experts, of which `dense` is there already."""
        if self._router is not None and self._experts is not None:
            normed = normed.clone()  # hooks may keep it
            _, weights, ids = self._router(normed)
            output = self._experts(normed, ids, weights)
            return output + self._gated(normed, dense[0]) if dense else output
        if dense:
            return dense[0]
        whole: torch.Tensor = self._mlp(normed.clone().view(shape))
        return whole.view(normed.shape)

    def _gated(self, normed: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """Qwen2-MoE scales its shared experts by a gate of their own."""
        if self._dense_gate is None:
            return dense
        scale: torch.Tensor = self._dense_gate(normed).sigmoid()
        return scale * dense

    def _build_before(self, graph: AnyGraph, x: GraphTensor) -> list[GraphTensor]:
        normed = self._input_norm.build(graph, x)
        return self._attention.build_inputs(graph, normed, self._rope)

    def _build_after(self, graph: AnyGraph, attended: GraphTensor) -> list[GraphTensor]:
        attention = self._attention.build_output(graph, attended)
        return self._build_behind(graph, attention, graph.wrap(self._x[: attention.shape[0]]))

    def _build_native(
        self, graph: NativeGraph, x: GraphTensor
    ) -> tuple[list[GraphTensor], AttendedCache]:
        normed = self._input_norm.build(graph, x)
        attended, cache = self._attention.build_attention(graph, normed, self._rope)
        attention = self._attention.build_output(graph, attended)
        return self._build_behind(graph, attention, x), cache

    def _can_be_whole(self) -> bool:
        """Whether a graph can have all of the layer. Mutates: `_routed`."""
        if self._mlp_scale != 1 or self._dense_gate is not None:
            return False
        if self._router is None:
            return self._dense is not None
        self._routed = routed_part(self._router, self._experts)
        return self._routed is not None

    def _build_whole(
        self, graph: NativeGraph, x: GraphTensor
    ) -> tuple[list[GraphTensor], AttendedCache]:
        (total, normed, *dense), cache = self._build_native(graph, x)
        outputs = dense
        if self._routed is not None:
            outputs = [self._routed.build(graph, normed), *dense]
        output, *others = outputs
        for other in others:
            output = graph.add(output, other)
        return [graph.add(output, total, self._out)], cache

    def _build_rows_before(self, graph: AnyGraph, x: GraphTensor) -> list[GraphTensor]:
        normed = self._input_norm.build(graph, x)
        projections: list[GraphTensor] = self._operator.projections.build(graph, normed)
        return projections

    def _build_rows_after(self, graph: AnyGraph, attended: GraphTensor) -> list[GraphTensor]:
        attention = self._operator.o_proj.build(graph, attended)
        return self._build_behind(graph, attention, graph.wrap(self._x[: attention.shape[0]]))

    def _build_behind(
        self, graph: AnyGraph, attention: GraphTensor, x: GraphTensor
    ) -> list[GraphTensor]:
        """What follows attention [R, H] of the layer's input x [R, H]."""
        total = graph.add(attention, x)
        normed = self._mlp_norm.build(graph, total)
        outputs = [total, normed]
        if self._dense is not None:
            outputs.append(self._dense.build(graph, normed))
        return outputs


def cpu_step(layer: GraphedLayer, ropes: dict[Rope, RopeMatrix]) -> CpuStep | None:
    """A decoder layer's step; None for layers of another form, or with matrices not quantised here.

    Args:
        ropes: shared by the layers of a model; what is missing is added.

    Mutates: `ropes`.
    """
    glue = layer.glue
    if glue is None:
        return None
    attention: Any = getattr(layer, glue.attention)
    if not isinstance(attention, FusedAttention | FusedMLA):
        return None
    norms = getattr(layer, glue.input_norm), getattr(layer, glue.mlp_norm)
    if not all(_has_graph(part) for part in (*attention.children(), *norms)):
        return None
    dense = _dense_part(layer)
    if dense is not None and not _has_graph(dense):
        return None
    if glue.attention_scale != 1 and attention.o_proj.bias is not None:
        return None
    rope = attention.rope
    if rope not in ropes:
        ropes[rope] = RopeMatrix(rope)
    return CpuStep(layer, dense, ropes[rope])


def _dense_part(layer: GraphedLayer) -> Any:
    """The MLP or the shared experts that go into a step's graph; None without."""
    assert layer.glue is not None
    mlp = getattr(layer, layer.glue.mlp)
    if layer.block is not None:
        return None if layer.block.shared is None else getattr(mlp, layer.block.shared)
    return mlp if isinstance(mlp, FusedMLP) else None


def _has_graph(module: Any) -> bool:
    """Whether a module can be built into a ggml graph."""
    if isinstance(module, GgmlLinear):
        return True
    return isinstance(module, FusedRMSNorm | FusedMLP) and module.ggml is not None
