"""One layer's routed experts on ggml: which graph computes a call."""

from __future__ import annotations

import torch

from hybrimoe_plugin.compute.cpu.ggml import Ggml, GraphTensor
from hybrimoe_plugin.compute.cpu.ggml_many_tokens import by_expert, by_index, weighted_sum
from hybrimoe_plugin.compute.cpu.ggml_single_token import SingleTokenGraph
from hybrimoe_plugin.compute.cpu.ggml_stored import StoredExperts
from hybrimoe_plugin.compute.cpu.ggml_union import UnionRows, Unions, addresses_of
from hybrimoe_plugin.compute.cpu.native.choice import TILED_ROWS, kernels_of
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph
from hybrimoe_plugin.compute.cpu.native.many_tokens import by_tiles, can_tile
from hybrimoe_plugin.compute.cpu.native.single_token import NativeSingleToken, add_experts
from hybrimoe_plugin.policy.step import FEW_ROWS
from hybrimoe_plugin.weights.layer_weights import LayerWeights

_ROWS_FOR_TILES = 6
"""Average rows of an expert from which `by_expert` is faster than `by_index`."""
_MAX_TOKENS = 512
"""Tokens per graph; longer calls are cut, since a graph's buffers grow with this."""


class GgmlLayer:
    """One layer's stored matrices, and its graphs for one token.

    Args:
        unions: the graphs for a few tokens, which layers share.
        repack: whether matrices may be copied into a type with faster kernels.

    Raises:
        BackendError: a type without a kernel.
    """

    def __init__(
        self, ggml: Ggml, threads: int, weights: LayerWeights, repack: bool, unions: Unions
    ) -> None:
        self.spec = weights.spec
        self.stored = StoredExperts.of(ggml, threads, weights, repack)
        self._unions = unions
        self._addresses = addresses_of(self.stored)
        self._plain = self.stored.plain
        self._rows_for_plain = self.stored.rows_for_plain if self._plain else 0.0
        self._single: dict[int, SingleTokenGraph | NativeSingleToken] = {}
        """By K."""
        self._kernels = kernels_of(ggml)
        self._tiles = can_tile(self._kernels, self.stored)

    def compute(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] of hidden's dtype: the weighted sum over all chosen experts.

        Graphs of many tokens are built anew each time: their buffers would stay for every length.
        """
        if len(hidden) == 1:
            top_k = ids.shape[1]
            graph = self._single.get(top_k)
            if graph is None:
                graph = self._single[top_k] = self._single_token(top_k)
            return graph.compute(hidden, ids, weights)
        if len(hidden) <= FEW_ROWS:
            few = self._few(hidden, ids, weights)
            if few is not None:
                return few
        if self._tiles_pay(ids):
            assert self._kernels is not None
            return by_tiles(self._kernels, self.stored, self._addresses, hidden, ids, weights)
        parts = [self._many(hidden[part], ids[part], weights[part]) for part in _parts(len(hidden))]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)

    def compute_part(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        """[T, H]: the weighted sum over the chosen experts where `kept` [T, K] is True."""
        if bool(kept.all()):
            return self.compute(hidden, ids, weights)
        if len(ids) == 1:
            ids = ids[kept][None]
            weights = weights[kept][None]
            if not ids.shape[1]:
                return torch.zeros_like(hidden)
            return self.compute(hidden, ids, weights)
        if len(hidden) <= FEW_ROWS:
            few = self._few(hidden, ids, weights, kept)
            if few is not None:
                return few
        if self._tiles_pay(ids, kept):
            assert self._kernels is not None
            return by_tiles(self._kernels, self.stored, self._addresses, hidden, ids, weights, kept)
        outputs = []
        for part in _parts(len(hidden)):
            output = by_expert(self.stored, hidden[part], ids[part], weights[part], kept[part])
            outputs.append(output)
        return torch.cat(outputs)

    def _single_token(self, top_k: int) -> SingleTokenGraph | NativeSingleToken:
        if self._kernels is None:
            return SingleTokenGraph(self.stored, top_k)
        return NativeSingleToken(self._kernels, self.stored, self._addresses, top_k)

    def _tiles_pay(self, ids: torch.Tensor, kept: torch.Tensor | None = None) -> bool:
        """Whether the experts have so many rows that tiles are the fastest."""
        if not self._tiles:
            return False
        rows = ids.numel() if kept is None else int(kept.sum())
        chosen = ids if kept is None else ids[kept]
        used = int(torch.count_nonzero(torch.bincount(chosen.reshape(-1))))
        return rows >= TILED_ROWS * used

    def add_to(
        self, graph: NativeGraph, x: GraphTensor, ids: GraphTensor, weights: GraphTensor
    ) -> GraphTensor:
        """The sum over one token's experts [1, H] in a graph; they must be SwiGLU without biases.

        Args:
            x: [1, H].
            ids: [K] int32.
            weights: [1, K].
        """
        assert self.stored.is_swiglu
        return add_experts(graph, self.stored, self._addresses, x, ids, weights)

    def _few(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """[T, H] by the kept graphs; None where they compute wrongly, or others are faster."""
        if not self._plain:
            return None
        rows = UnionRows.of(ids, kept)
        # A plain product takes about the same time for one row as for two.
        if len(rows.choices) < self._rows_for_plain * len(rows.experts):
            return None
        if not len(rows.choices):
            return torch.zeros_like(hidden)
        outputs = self._unions.compute(self.stored, self._addresses, hidden, rows, ids)
        by_choice = outputs.new_empty(ids.numel(), outputs.shape[1])
        if kept is not None:
            by_choice.zero_()  # choices that do not count keep their zeros
        by_choice.index_copy_(0, torch.from_numpy(rows.choices), outputs)
        return weighted_sum(by_choice.view(*ids.shape, -1), weights, hidden.dtype)

    def _many(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        loads = torch.bincount(ids.reshape(-1))
        used = int(torch.count_nonzero(loads))
        for_tiles = self.stored.tiled and ids.numel() >= _ROWS_FOR_TILES * used
        if for_tiles or not self.stored.indexable:
            return by_expert(self.stored, hidden, ids, weights)
        return by_index(self.stored, hidden, ids, weights)


def _parts(tokens: int) -> list[slice]:
    """Where a call is cut, so that no part has more than `_MAX_TOKENS`."""
    starts = range(0, tokens, _MAX_TOKENS)
    return [slice(start, start + _MAX_TOKENS) for start in starts]
