"""Two ways through many tokens' experts as ggml graphs, built for each call.

`by_index` has one product for each step with all experts' indices, `by_expert` one for each expert
on rows that are sorted by expert:

    chosen experts [T, K]    5 3 | 0 5 | 0 3      T = 3, K = 2
    rows, sorted             0: tokens 1 2    3: tokens 0 2    5: tokens 0 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hybrimoe_plugin.compute.cpu.ggml import Graph, GraphTensor, buffer
from hybrimoe_plugin.compute.cpu.ggml_stored import (
    ApartExperts,
    Projection,
    StoredExperts,
    expert_matrix,
)

_TENSORS = 6
"""Most tensors of one expert's product: matrix, rows and result, and ids and two views of others
where it is an indexed one.
"""


def by_index(
    stored: StoredExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[T, H] of hidden's dtype: the weighted sum over each token's experts.

    Args:
        stored: must be `indexable`.
        hidden: [T, H].
        ids: [T, K]; must be in range.
        weights: [T, K].
    """
    assert not isinstance(stored.gate, ApartExperts)
    assert not isinstance(stored.up, ApartExperts)
    assert not isinstance(stored.down, ApartExperts)
    graph = Graph(stored.ggml, stored.threads)
    x = graph.input(len(hidden), 1, hidden.shape[1])
    chosen = graph.input(*ids.shape, dtype=torch.int32)
    gates = graph.matmul_id(graph.weight(stored.gate), x, chosen)
    ups = graph.matmul_id(graph.weight(stored.up), x, chosen)
    x.fill(hidden[:, None])
    chosen.fill(ids)
    if stored.is_swiglu:
        inner = graph.silu_mul(gates, ups)
        out = graph.matmul_id(graph.weight(stored.down), inner, chosen)
        graph.finish(out)
        graph.run()
        spoiled = graph.spoiled
    else:
        graph.finish(gates, ups)
        graph.run()
        stored.activate(gates.value, ups.value, ids)
        inner = gates
        second = Graph(stored.ggml, stored.threads)
        again = second.wrap_ids(chosen.value)
        out = second.matmul_id(second.weight(stored.down), second.wrap(inner.value), again)
        second.finish(out)
        second.run()
        stored.add_down_bias(out.value, ids)
        spoiled = graph.spoiled or second.spoiled
    if spoiled:
        finite = _finite_rows(x.value) & _finite_rows(inner.value)
        out.value[~finite] = math.nan
    return weighted_sum(out.value, weights, hidden.dtype)


def by_expert(
    stored: StoredExperts,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `by_index`; a product of several rows goes through llamafile's tiles if they are right.

    Args:
        kept: [T, K] bool: choices that count; all where it is not given.
    """
    top_k = ids.shape[1]
    flat_ids = ids.reshape(-1)
    order = _sorted_choices(flat_ids, kept)
    count = len(order)
    if not count:
        return torch.zeros_like(hidden)
    loads = torch.bincount(flat_ids[order]).tolist()
    used = sum(load > 0 for load in loads)
    nodes = 3 * _TENSORS * used + 8
    graph = Graph(stored.ggml, stored.threads, nodes=nodes)
    _, inner, width = stored.gate.shape
    tokens = order // top_k
    x = hidden.detach().float().index_select(0, tokens)
    gates = buffer(count, inner)
    ups = buffer(count, inner)
    outputs = buffer(count, width)
    steps = _expert_products(graph, stored.gate, loads, x, gates)
    steps += _expert_products(graph, stored.up, loads, x, ups)
    graphs = [graph]
    if stored.is_swiglu:
        steps.append(graph.silu_mul(graph.wrap(gates), graph.wrap(ups)))
    else:
        graph.finish(*steps)
        graph.run()
        stored.activate(gates, ups, flat_ids[order])
        steps = []
        graph = Graph(stored.ggml, stored.threads, nodes=nodes)
        graphs.append(graph)
    steps += _expert_products(graph, stored.down, loads, gates, outputs)
    graph.finish(*steps)
    graph.run()
    if not stored.is_swiglu:
        stored.add_down_bias(outputs, flat_ids[order])
    if any(graph.spoiled for graph in graphs):
        finite = _finite_rows(x) & _finite_rows(gates)
        outputs[~finite] = math.nan
    by_choice = outputs.new_empty(len(flat_ids), width)
    if kept is not None:
        by_choice.zero_()  # choices that do not count keep their zeros
    by_choice.index_copy_(0, order, outputs)
    return weighted_sum(by_choice.view(*ids.shape, width), weights, hidden.dtype)


def _sorted_choices(flat_ids: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Places in `flat_ids` [T * K] that count, sorted by expert."""
    if kept is None:
        return torch.argsort(flat_ids, stable=True)
    places = kept.reshape(-1).nonzero()[:, 0]
    by_expert = torch.argsort(flat_ids[places], stable=True)
    return places[by_expert]


def _expert_products(
    graph: Graph,
    stored: Projection,
    loads: Sequence[int],
    x: torch.Tensor,
    out: torch.Tensor,
) -> list[GraphTensor]:
    """One product for each expert that has rows.

    Args:
        loads: rows of each expert.
        x: [R, M], sorted by expert.
        out: [R, N], in the same order. Mutates, when the graph runs.
    """
    products = []
    start = 0
    for expert, load in enumerate(loads):
        if not load:
            continue
        end = start + load
        weight = graph.weight(expert_matrix(stored, expert))
        rows = graph.wrap(x[start:end])
        products.append(graph.matmul(weight, rows, out[start:end]))
        start = end
    return products


def _finite_rows(values: torch.Tensor) -> torch.Tensor:
    """[...] bool from values [..., M]."""
    return values.isfinite().all(dim=-1)


def weighted_sum(outputs: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, H] from experts' outputs [T, K, H] and weights [T, K]."""
    sums = torch.bmm(weights.float()[:, None], outputs)
    return sums[:, 0].to(dtype)
