"""One token's K experts as compiled operations."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.ggml import GraphTensor, buffer
from hybrimoe_plugin.compute.cpu.ggml_stored import Projection, StoredExperts, expert_matrix
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph
from hybrimoe_plugin.compute.cpu.native.kernels import Kernels
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix


class NativeSingleToken:
    """As `SingleTokenGraph`, which is its plain twin.

    Args:
        addresses: [3, E], of each expert's matrices.
        top_k: K.
    """

    def __init__(
        self, kernels: Kernels, stored: StoredExperts, addresses: NDArray[np.int64], top_k: int
    ) -> None:
        self._stored = stored  # mapped as long as the graph may read it
        _, inner_width, width = stored.gate.shape
        self._ids = buffer(top_k, dtype=torch.int32)
        self._x = buffer(1, width)
        self._weights = buffer(1, top_k)
        graph = NativeGraph(stored.ggml, kernels, stored.threads)
        self._graphs = [graph]
        ids, x = graph.wrap_ids(self._ids), graph.wrap(self._x)
        self._sum: torch.Tensor | None = None
        if stored.is_swiglu:
            weights = graph.wrap(self._weights)
            self._sum = add_experts(graph, stored, addresses, x, ids, weights).value
            graph.finish()
            return
        self._gates = buffer(top_k, inner_width)
        self._ups = buffer(top_k, inner_width)
        self._outputs = buffer(top_k, width)
        gates_at, ups_at, downs_at = addresses
        graph.matmul_chosen(_like(stored.gate), gates_at, ids, x, self._gates)
        graph.matmul_chosen(_like(stored.up), ups_at, ids, x, self._ups)
        graph.finish()
        graph = NativeGraph(stored.ggml, kernels, stored.threads)
        self._graphs.append(graph)
        ids, inner = graph.wrap_ids(self._ids), graph.wrap(self._gates)
        graph.matmul_chosen(_like(stored.down), downs_at, ids, inner, self._outputs)
        graph.finish()

    def compute(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """[1, H] of hidden's dtype.

        Args:
            hidden: [1, H].
            ids: [1, K]; must be in range.
            weights: [1, K].
        """
        self._ids.copy_(ids[0])
        self._x.copy_(hidden.detach())
        self._weights.copy_(weights.detach())
        first, *second = self._graphs
        first.run()
        for graph in second:
            self._stored.activate(self._gates, self._ups, ids[0])
            graph.run()
        if self._sum is not None:
            return self._sum.to(hidden.dtype, copy=True)
        self._stored.add_down_bias(self._outputs, ids[0])
        return torch.mm(weights.float(), self._outputs).to(hidden.dtype)


def add_experts(
    graph: NativeGraph,
    stored: StoredExperts,
    addresses: NDArray[np.int64],
    x: GraphTensor,
    ids: GraphTensor,
    weights: GraphTensor,
) -> GraphTensor:
    """Add SwiGLU experts to a graph: [1, H], the sum over the chosen ones.

    Args:
        x: [1, H].
        ids: [K] int32.
        weights: [1, K].
    """
    (top_k,) = ids.shape
    _, inner, hidden = stored.gate.shape
    gates_at, ups_at, downs_at = addresses
    gates = graph.matmul_chosen(_like(stored.gate), gates_at, ids, x, buffer(top_k, inner))
    ups = graph.matmul_chosen(_like(stored.up), ups_at, ids, x, buffer(top_k, inner))
    gates = graph.silu_mul(gates, ups)
    outputs = graph.matmul_chosen(_like(stored.down), downs_at, ids, gates, buffer(top_k, hidden))
    return graph.weighted_sum(outputs, weights)


def _like(stored: Projection) -> QuantizedMatrix:
    return expert_matrix(stored, 0)
