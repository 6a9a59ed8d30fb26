"""The ggml graph of one token with K experts, built once and run at every step."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch

from hybrimoe_plugin.compute.cpu.ggml import Graph, GraphTensor, buffer
from hybrimoe_plugin.compute.cpu.ggml_stored import (
    ApartExperts,
    Projection,
    StoredExperts,
    expert_matrix,
)


class _PointedProducts(NamedTuple):
    """K products whose weights are pointed at the chosen experts before each run."""

    addresses: tuple[int, ...]
    """Of each expert's matrix."""
    pointers: list[ctypes.c_uint64]
    """Where the addresses of the chosen experts' matrices go."""


class SingleTokenGraph:
    """One token's K experts.

    Each of the three steps is one product with the experts' indices, or K products of one matrix
    where plain ones are faster (`Ggml.kernel_speed`) or experts do not lie evenly:

        indexed   [E, N, M] matrices, ids [K] -> one node
        pointed   K nodes, each with the address of one expert's matrix, set before the run

    Other activations than SwiGLU, and biases, are torch's between the two halves of the step, which
    are then a graph each.

    Args:
        top_k: K.
    """

    def __init__(self, stored: StoredExperts, top_k: int) -> None:
        self._top_k = top_k
        self._stored = stored  # mapped as long as the graph may read it
        self._pointed: list[_PointedProducts] = []
        nodes = 10 * top_k + 16
        graph = Graph(stored.ggml, stored.threads, kept=True, nodes=nodes)
        self._ids = buffer(1, top_k, dtype=torch.int32)
        _, inner, hidden = stored.gate.shape
        self._x = buffer(1, hidden)
        self._gates = gates = buffer(top_k, inner)
        self._ups = ups = buffer(top_k, inner)
        self._outputs = buffer(top_k, hidden)
        steps = self._products(graph, stored.gate, self._x, gates)
        steps += self._products(graph, stored.up, self._x, ups)
        self._graphs = [graph]
        if stored.is_swiglu:
            steps.append(graph.silu_mul(graph.wrap(gates), graph.wrap(ups)))
        else:
            graph.finish(*steps)
            steps = []
            graph = Graph(stored.ggml, stored.threads, kept=True, nodes=nodes)
            self._graphs.append(graph)
        steps += self._products(graph, stored.down, gates, self._outputs)
        graph.finish(*steps)

    def compute(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """[1, H] of hidden's dtype.

        Args:
            hidden: [1, H].
            ids: [1, K]; must be in range.
            weights: [1, K].
        """
        chosen = ids[0].tolist()
        for addresses, pointers in self._pointed:
            for expert, pointer in zip(chosen, pointers, strict=True):
                pointer.value = addresses[expert]
        self._ids.copy_(ids)
        self._x.copy_(hidden.detach())
        first, *second = self._graphs
        first.run()
        for graph in second:
            self._stored.activate(self._gates, self._ups, ids[0])
            graph.run()
            self._stored.add_down_bias(self._outputs, ids[0])
        if any(graph.spoiled for graph in self._graphs):
            self._outputs.fill_(math.nan)
        weighted = torch.mm(weights.float(), self._outputs)
        return weighted.to(hidden.dtype)

    def _products(
        self, graph: Graph, stored: Projection, x: torch.Tensor, out: torch.Tensor
    ) -> list[GraphTensor]:
        """out [K, N] from the experts' matrices [E, N, M] and x [1 or K, M]."""
        weights = None if isinstance(stored, ApartExperts) else graph.weight(stored)
        if weights is not None and graph.indexed(weights):
            rows = graph.wrap(x[None])
            return [graph.matmul_id(weights, rows, graph.wrap_ids(self._ids), out)]
        first = expert_matrix(stored, 0)
        pointers = []
        products = []
        rows_of_x = x.expand(self._top_k, -1)
        for place in range(self._top_k):
            expert = graph.weight(first)
            pointers.append(graph.pointer(expert))
            row = graph.wrap(rows_of_x[place : place + 1])
            target = out[place : place + 1]
            products.append(graph.matmul(expert, row, target))
        experts = [expert_matrix(stored, expert) for expert in range(stored.shape[0])]
        addresses = tuple(expert.data.ctypes.data for expert in experts)
        self._pointed.append(_PointedProducts(addresses, pointers))
        return products
