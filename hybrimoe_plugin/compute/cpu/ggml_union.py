"""The ggml graphs of a few tokens, whose experts get a row or two each.

    chosen experts [T, K]    5 3 | 0 5 | 0 3      T = 3, K = 2
    places                   0: tokens 1 2    3: tokens 0 2    5: tokens 0 1    -    -    -

A graph has a place for each expert of the union. Before each run its places are pointed at the
chosen experts' matrices and at their rows, and given their number of rows; those left over have
none. So one graph serves every call of up to so many experts, and every layer of the same shapes:
built anew for each call, the graph of 82 experts would take a fifth of the call's time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.ggml import Graph, GraphTensor, buffer
from hybrimoe_plugin.compute.cpu.ggml.resized import Pointed, Resized
from hybrimoe_plugin.compute.cpu.ggml.tensor import FLOATS
from hybrimoe_plugin.compute.cpu.ggml_stored import StoredExperts, expert_matrix
from hybrimoe_plugin.policy.step import FEW_ROWS

_LEAST_PLACES = 8
"""Of the smallest graph; each next one has twice as many."""

_FROM_THE_FIRST = np.zeros(1, np.int64)

Integers = NDArray[np.int64]


class UnionRows(NamedTuple):
    """The rows of a call, sorted by expert."""

    choices: Integers
    """[R]: places in the flat [T x K] that count."""
    experts: Integers
    """[U]: the experts that have rows, ascending."""
    loads: Integers
    """[U]: their rows."""

    @classmethod
    def of(cls, ids: torch.Tensor, kept: torch.Tensor | None) -> UnionRows:
        """From ids [T, K] and, where not all choices count, `kept` [T, K] bool."""
        flat = ids.reshape(-1).numpy().astype(np.int64)
        if kept is None:
            choices = np.argsort(flat, kind="stable")
        else:
            places = np.flatnonzero(kept.reshape(-1).numpy())
            choices = places[np.argsort(flat[places], kind="stable")]
        counts = np.bincount(flat[choices])
        experts = np.flatnonzero(counts)
        return cls(choices, experts, counts[experts])


class UnionBuffers(NamedTuple):
    """Memory for the rows of one call; what is never used takes none."""

    x: torch.Tensor
    """[R, H]"""
    gates: torch.Tensor
    """[R, I]"""
    ups: torch.Tensor
    """[R, I]"""
    outputs: torch.Tensor
    """[R, H]"""


class UnionGraph:
    """A graph with places for so many experts, of up to `FEW_ROWS` rows each.

    Other activations than SwiGLU, and biases, are torch's between two graphs.

    Args:
        like: a layer with the shapes and types that this is for; it may compute others like it.
    """

    def __init__(self, like: StoredExperts, places: int, buffers: UnionBuffers) -> None:
        self._buffers = buffers
        self._places = places
        self._x_is_rounded = like.gate.type_name not in FLOATS or like.up.type_name not in FLOATS
        self._inner_is_rounded = like.down.type_name not in FLOATS
        self._like = like  # mapped as long as the graph may read it
        graph = self._graph()
        gates, gate_weights, x = self._products(graph, 0, buffers.x, buffers.gates)
        ups, up_weights, _ = self._products(graph, 1, x, buffers.ups)
        graphs = [graph]
        steps = [*gates, *ups]
        whole: list[GraphTensor] = []
        if like.is_swiglu:
            inner, factor = graph.wrap(buffers.gates), graph.wrap(buffers.ups)
            activated = graph.silu(inner)
            product = graph.multiply(activated, factor)
            whole = [inner, factor, activated, product]
            steps.append(product)
        else:
            graph.finish(*steps)
            steps = []
            graphs.append(self._graph())
        last = graphs[-1]
        downs, down_weights, inner_rows = self._products(last, 2, buffers.gates, buffers.outputs)
        last.finish(*steps, *downs)
        self._graphs = graphs
        first_rows, last_rows = [x, gates, ups], [inner_rows, downs]
        first_weights, last_weights = [gate_weights, up_weights], [down_weights]
        if last is graph:
            first_rows += last_rows
            first_weights += last_weights
        self._weights = [(Pointed(graph, first_weights), slice(len(first_weights)))]
        """And which of the three matrices they are."""
        self._rows = [Resized(graph, first_rows)]
        if last is not graph:
            self._weights.append((Pointed(last, last_weights), slice(2, 3)))
            self._rows.append(Resized(last, last_rows))
        self._whole = Resized(graph, [[tensor] for tensor in whole]) if whole else None

    def compute(
        self, stored: StoredExperts, addresses: Integers, ids: torch.Tensor, rows: UnionRows
    ) -> torch.Tensor:
        """[R, H] float32 from the first R rows of the buffers' x. Valid until the next run.

        Rows with a NaN or an infinity are NaN.

        Args:
            addresses: [3, E], of the layer's matrices.
            ids: [R] the rows' experts.
        """
        buffers, count = self._buffers, len(rows.choices)
        loads = np.zeros(self._places, np.int64)
        loads[: len(rows.loads)] = rows.loads
        starts = np.cumsum(loads) - loads
        chosen = addresses[:, rows.experts]
        for weights, which in self._weights:
            weights.set(chosen[which])
        for part in self._rows:
            part.set(loads, starts)
        if self._whole is not None:
            self._whole.set(np.array([count]), _FROM_THE_FIRST)
        first, *second = self._graphs
        first.run()
        for graph in second:
            stored.activate(buffers.gates[:count], buffers.ups[:count], ids)
            graph.run()
            stored.add_down_bias(buffers.outputs[:count], ids)
        outputs = buffers.outputs[:count]
        for rounded, values in (
            (self._x_is_rounded, buffers.x[:count]),
            (self._inner_is_rounded, buffers.gates[:count]),
        ):
            if rounded and not math.isfinite(values.sum().item()):
                outputs[~values.isfinite().all(dim=-1)] = math.nan
        return outputs

    def _graph(self) -> Graph:
        # A weight, a result, and rows that are read for each place and product; and some more.
        nodes = 9 * self._places + 8
        return Graph(self._like.ggml, self._like.threads, nodes=nodes, watched=False)

    def _products(
        self,
        graph: Graph,
        matrix: int,
        x: torch.Tensor | list[GraphTensor],
        out: torch.Tensor,
    ) -> tuple[list[GraphTensor], list[GraphTensor], list[GraphTensor]]:
        """For each place its product, its weights, and the rows that it reads."""
        like = self._like
        first = expert_matrix((like.gate, like.up, like.down)[matrix], 0)
        weights = [graph.weight(first) for _ in range(self._places)]
        if isinstance(x, torch.Tensor):
            x = [graph.wrap(x[:FEW_ROWS]) for _ in range(self._places)]
        products = [
            graph.matmul(weight, rows, out[:FEW_ROWS], indexed=False)
            for weight, rows in zip(weights, x, strict=True)
        ]
        return products, weights, x


class Unions:
    """The graphs of all layers that compute on one thread, one call at a time.

    A model has a graph for each power of two of experts, of some 9 KB a place, and buffers of
    `FEW_ROWS` x K rows: 6 MB at most for Qwen3-30B-A3B, of which only what calls use is touched.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[object, ...], UnionGraph] = {}
        self._buffers: dict[tuple[int, int, int], UnionBuffers] = {}

    def compute(
        self,
        stored: StoredExperts,
        addresses: Integers,
        hidden: torch.Tensor,
        rows: UnionRows,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """[R, H] float32, the experts' outputs of a call's rows. Valid until the next call.

        Args:
            addresses: [3, E], of the layer's matrices.
            hidden: [T, H], of at most `FEW_ROWS` tokens.
            ids: [T, K]; must be in range, and none twice for a token.
        """
        top_k = ids.shape[1]
        assert len(ids) <= FEW_ROWS
        choices = torch.from_numpy(rows.choices)
        buffers = self._buffers_for(stored, top_k)
        x = hidden.detach().float()
        torch.index_select(x, 0, choices // top_k, out=buffers.x[: len(choices)])
        graph = self._graph_for(stored, len(rows.experts), top_k)
        return graph.compute(stored, addresses, ids.reshape(-1)[choices], rows)

    def _graph_for(self, stored: StoredExperts, experts: int, top_k: int) -> UnionGraph:
        """One with places for so many experts of a call with K experts a token."""
        most = stored.gate.shape[0]
        places = min(_LEAST_PLACES, most)
        while places < experts:
            places = min(2 * places, most)
        parts = stored.gate, stored.up, stored.down
        forms = tuple((part.type_name, part.shape[1:]) for part in parts)
        key = stored.ggml, stored.threads, forms, stored.is_swiglu, top_k, places
        found = self._graphs.get(key)
        if found is None:
            buffers = self._buffers_for(stored, top_k)
            found = self._graphs[key] = UnionGraph(stored, places, buffers)
        return found

    def _buffers_for(self, stored: StoredExperts, top_k: int) -> UnionBuffers:
        _, inner, width = stored.gate.shape
        key = inner, width, top_k
        found = self._buffers.get(key)
        if found is None:
            widths = width, inner, inner, width
            made = (buffer(FEW_ROWS * top_k, columns) for columns in widths)
            found = self._buffers[key] = UnionBuffers(*made)
        return found


def addresses_of(stored: StoredExperts) -> Integers:
    """[3, E]: where each expert's matrices lie."""
    found = []
    for part in (stored.gate, stored.up, stored.down):
        matrices = (expert_matrix(part, expert) for expert in range(part.shape[0]))
        found.append([matrix.data.ctypes.data for matrix in matrices])
    return np.array(found, np.int64)
