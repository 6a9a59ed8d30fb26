"""One token through a decoder layer on the CPU in two graphs: a small operation costs more than its
arithmetic.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from hybrimoe_plugin.compute.cpu.ggml import Ggml, Graph, GraphTensor, buffer
from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.operators.attention import FusedAttention, Turn, angles
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.linear import GgmlLinear, RowGraphs
from hybrimoe_plugin.operators.mla import FusedMLA
from hybrimoe_plugin.operators.mlp import FusedMLP
from hybrimoe_plugin.operators.norm import FusedRMSNorm

FAMILIES = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV2", "DeepseekV3")
"""Their layers are x + attention(norm(x)), and then x + mlp(norm(x)), with MLPs that `RowStep`
knows.
"""


class RowAttention(Protocol):
    """Attention of one token, cut where the cache is: graph, torch, graph."""

    ggml: Ggml | None

    @property
    def turn(self) -> tuple[Turn, int]:
        """The rotary embedding, and the width that it turns."""
        ...

    def before(self, graph: Graph, x: GraphTensor, turned: GraphTensor) -> list[GraphTensor]:
        """Queries and what the cache keeps from x [1, H], turned by the matrix of the token's place
        [D, D].
        """
        ...

    def between(self, parts: list[torch.Tensor], cache: Any) -> torch.Tensor:
        """What `after` takes from the values of `before`. Mutates: the cache."""
        ...

    def after(self, graph: Graph, attended: GraphTensor) -> GraphTensor:
        """[1, H]: the output projection."""
        ...


class Rotation:
    """The rotary embedding of the running step's position as a matrix [D, D], for all layers of a
    model.
    """

    def __init__(self, turn: Turn, width: int) -> None:
        self._turn = turn
        self._basis = torch.eye(width, device="cpu")
        self._shown: Any = None
        self.matrix = buffer(width, width)

    def show(self, embeddings: Any) -> None:
        """Take what the model's rotary module gave, the same object for every layer of a step.

        Raises:
            InputError: angles of another shape than one token's.
        """
        if embeddings is not self._shown:
            self._shown = None
            half = len(self._basis) // 2
            cos, sin = angles(embeddings, half)
            if cos.shape != (1, 1, 1, half):
                raise InputError(
                    f"one token has one position of {half} angles, found {list(cos.shape)}: "
                    "position_ids must be [1, 1] for it"
                )
            self.matrix.copy_(self._turn(self._basis, cos[0, 0], sin[0, 0]).t())
            self._shown = embeddings


class RowStep:
    """A layer's call for one token [1, 1, H] float32: what needs no decision goes into the graphs
    around attention.

    Gives what the layer gives. Router and experts are called as modules.

    Args:
        layer: x + attention(norm(x)), and then x + mlp(norm(x)).
        dense: its MLP, or the shared experts of its MLP, if it has any.
    """

    def __init__(self, layer: Any, dense: FusedMLP | None, rotation: Rotation) -> None:
        attention: RowAttention = layer.self_attn
        assert attention.ggml is not None
        self._attention = attention
        self._norms: tuple[FusedRMSNorm, FusedRMSNorm] = (
            layer.input_layernorm,
            layer.post_attention_layernorm,
        )
        self._gate: nn.Module | None = getattr(layer.mlp, "gate", None)
        self._experts: HybriMoEExperts | None = getattr(layer.mlp, "experts", None)
        self._dense = dense
        self._dense_gate: nn.Module | None = getattr(layer.mlp, "shared_expert_gate", None)
        self._rotation = rotation
        self._x = buffer(1, len(layer.input_layernorm.weight))
        """[1, H]: the layer's input, which both graphs read."""
        self._before = RowGraphs(attention.ggml, self._build_before, row=self._x)
        self._after = RowGraphs(attention.ggml, self._build_after)

    def __call__(self, hidden: torch.Tensor, embeddings: Any, cache: Any) -> torch.Tensor:
        """[1, 1, H]. Mutates: the cache."""
        self._rotation.show(embeddings)
        attended = self._attention.between(self._before(hidden[0], 1), cache)
        total, normed, *dense = self._after(attended, 1)
        if self._gate is None or self._experts is None:
            return (dense[0] + total)[None]
        normed = normed.clone()  # who watches may keep it
        _, weights, ids = self._gate(normed)
        output: torch.Tensor = self._experts(normed, ids, weights)
        if dense:
            output = output + (
                dense[0]
                if self._dense_gate is None
                else self._dense_gate(normed).sigmoid() * dense[0]
            )
        return (output + total)[None]

    def _build_before(self, graph: Graph, x: GraphTensor) -> list[GraphTensor]:
        normed = self._norms[0].build(graph, x)
        return self._attention.before(graph, normed, graph.wrap(self._rotation.matrix))

    def _build_after(self, graph: Graph, attended: GraphTensor) -> list[GraphTensor]:
        total = graph.add(self._attention.after(graph, attended), graph.wrap(self._x))
        normed = self._norms[1].build(graph, total)
        return [total, normed, *([] if self._dense is None else [self._dense.build(graph, normed)])]


def row_step(layer: Any, rotations: dict[tuple[Turn, int], Rotation]) -> RowStep | None:
    """The step of a decoder layer, where it is of a known kind and its matrices are as stored on
    the CPU.

    Mutates: `rotations`, which layers of one model share.
    """
    family = type(layer).__name__.removesuffix("DecoderLayer")
    if family not in FAMILIES or not isinstance(layer.self_attn, FusedAttention | FusedMLA):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    dense = mlp
    if isinstance(getattr(mlp, "experts", None), HybriMoEExperts):
        if getattr(mlp, "jitter_noise", 0):  # only while Mixtral trains
            return None
        dense = getattr(mlp, "shared_experts", None) or getattr(mlp, "shared_expert", None)
    parts = [*attention.children(), layer.input_layernorm, layer.post_attention_layernorm]
    if not all(map(_in_graphs, parts if dense is None else [*parts, dense])):
        return None
    if attention.turn not in rotations:
        rotations[attention.turn] = Rotation(*attention.turn)
    return RowStep(layer, dense, rotations[attention.turn])


def _in_graphs(module: Any) -> bool:
    return isinstance(module, GgmlLinear) or (
        isinstance(module, FusedRMSNorm | FusedMLP) and module.ggml is not None
    )
