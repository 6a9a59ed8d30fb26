"""CPU experts as ggml graphs, for any GGML type and shape.

Where nothing else computes meanwhile they run on the caller's own threads, the same OpenMP threads
as torch's, so that no two pools fight for the cores. Beside an accelerator they run on a thread of
their own, and its OpenMP team.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hybrimoe_plugin.compute.cpu.ggml import Ggml, Graph, Node, buffer, check_stored
from hybrimoe_plugin.compute.cpu.kt_experts import check_kinds
from hybrimoe_plugin.compute.cpu.repack import SLOW_TYPES, as_q8_0, quicker_as_q8_0, repacked_bytes
from hybrimoe_plugin.device.memory import free_host_bytes
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_SHARE_OF_FREE = 0.02
"""A matrix of all experts of a layer is repacked only if it takes less than this share of the
memory still free.
"""
_ROWS_FOR_TILES = 6
"""Rows for each expert, on average, from which one product for each is quicker than one with all
experts' indices.
"""
_MAX_TOKENS = 512
"""Tokens per graph; longer calls are cut, since a graph's buffers grow with this."""


class GgmlExperts:
    """Routed experts of any GGML type straight from the mapped bytes.

    Args:
        threads: OpenMP threads that compute; the caller's is one of them unless `beside`.
        beside: compute while the caller goes on, between `submit` and `sync`.

    Raises:
        BackendError: kt-kernel's ggml cannot be used.
    """

    name = "ggml"

    def __init__(self, threads: int, beside: bool = False) -> None:
        self.threads = threads
        self.workers = threads if beside else 0
        self.repack = not beside
        """Whether layers added from now may be copied into a type with faster kernels, where memory
        is plentiful.

        Beside an accelerator the file's pages want that memory: experts cross the link from there.
        """
        self._ggml = Ggml()
        self._layers: list[_Layer] = []
        self._worker = ThreadPoolExecutor(1, "cpu-experts") if beside else None
        self._pending: Callable[[], torch.Tensor] | None = None

    def share(self, ggml: Ggml) -> None:
        """Use the kernels, and with them the team of threads, of the model's dense part for layers
        added from now.

        Beside an accelerator the team is the worker thread's, which no dense part uses.
        """
        if self._worker is None:
            self._ggml = ggml

    def add_layer(self, weights: LayerWeights) -> None:
        """Raises: BackendError: a type without a kernel."""
        self._layers.append(_Layer(self._ggml, self.threads, weights, self.repack))

    def submit(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        mine: Sequence[int],
    ) -> None:
        """The tensors must stay as they are until `sync`. Raises: BackendError: as `compute`."""
        if self._pending is not None:
            self.sync()
        target = self._layers[layer]
        _check(target, hidden, topk_ids, topk_weights)
        kept = torch.isin(topk_ids, torch.tensor(mine, dtype=torch.int64, device="cpu"))
        call = functools.partial(target.part, hidden, topk_ids, topk_weights, kept)
        if self._worker is not None:
            self._pending = self._worker.submit(call).result
        else:
            output = call()
            self._pending = lambda: output

    def sync(self) -> torch.Tensor:
        assert self._pending is not None, "sync without submit"
        pending, self._pending = self._pending, None
        return pending()

    def abandon(self) -> None:
        if self._worker is not None:
            self._worker.submit(int).result()  # behind everything that it was given
        self._pending = None

    def compute(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] of hidden's dtype: every chosen expert of every token, computed at once, on the
        caller's thread.

        Args:
            hidden: [T, H] floating point on the CPU.
            topk_ids: [T, K] integers on the CPU.
            topk_weights: [T, K] floating point on the CPU.

        Raises:
            BackendError: a shape or id that the kernel must not see.
        """
        target = self._layers[layer]
        _check(target, hidden, topk_ids, topk_weights)
        return target.compute(hidden, topk_ids, topk_weights)

    def close(self) -> None:
        self._pending = None
        if self._worker is not None:
            self._worker.shutdown()  # waits for what still runs: it reads from the layers
        self._layers.clear()


class _Layer:
    """One layer's stored matrices, and its graph for one token."""

    def __init__(self, ggml: Ggml, threads: int, weights: LayerWeights, repack: bool) -> None:
        self.spec = weights.spec
        spec = weights.spec
        inner, outer = (
            (spec.experts, spec.intermediate, spec.hidden),
            (spec.experts, spec.hidden, spec.intermediate),
        )
        self._stored = [
            QuantizedMatrix(_stacked(matrix), matrix.type_name, shape)
            for matrix, shape in zip(weights.matrices(), (inner, inner, outer), strict=True)
        ]
        for index, stored in enumerate(self._stored):
            check_stored(stored)
            small = repacked_bytes(stored) < _SHARE_OF_FREE * free_host_bytes()
            candidate = repack and small and stored.type_name in SLOW_TYPES
            if candidate and quicker_as_q8_0(ggml, threads, stored.type_name):
                self._stored[index] = as_q8_0(stored)
            ggml.pace(self._stored[index].type_name, threads)  # else the first answer waits for it
        self._ggml = ggml
        self._threads = threads
        self._one: dict[int, _OneToken] = {}

    def part(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor:
        """[T, H]: the chosen experts where `kept` [T, K] says so."""
        if bool(kept.all()):
            return self.compute(hidden, ids, weights)
        if len(ids) > 1:
            return torch.cat(
                [
                    _by_expert(
                        self._ggml,
                        self._threads,
                        self._stored,
                        hidden[part],
                        ids[part],
                        weights[part],
                        kept[part],
                    )
                    for part in _parts(len(hidden))
                ]
            )
        ids, weights = ids[kept][None], weights[kept][None]
        return self.compute(hidden, ids, weights) if ids.shape[1] else torch.zeros_like(hidden)

    def compute(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H]: all of them. Graphs of many tokens are built anew: their buffers would stay for
        every length.
        """
        if len(hidden) == 1:
            count = ids.shape[1]
            call = self._one.get(count)
            if call is None:
                call = self._one[count] = _OneToken(self._ggml, self._threads, self._stored, count)
            return call.run(hidden, ids, weights)
        parts = [self._many(hidden[part], ids[part], weights[part]) for part in _parts(len(hidden))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _many(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        used = int(torch.count_nonzero(torch.bincount(ids.reshape(-1))))
        way = _by_expert if ids.numel() >= _ROWS_FOR_TILES * used else _by_index
        return way(self._ggml, self._threads, self._stored, hidden, ids, weights)


class _OneToken:
    """The graph of one token with K experts.

    Each of its three steps is one product with the experts' indices, or K plain products whose
    weights are pointed at the chosen experts where those are the quicker ones (`Ggml.pace`).
    """

    def __init__(
        self, ggml: Ggml, threads: int, stored: Sequence[QuantizedMatrix], count: int
    ) -> None:
        self._count = count
        self._stored = stored  # mapped as long as the graph may read it
        self._pointed: list[tuple[int, int, list[ctypes.c_uint64]]] = []
        """Base address, bytes of an expert, and where the addresses of the chosen ones go."""
        graph = self._graph = Graph(ggml, threads, kept=True, nodes=10 * count + 16)
        _, inner, hidden = stored[0].shape
        gates, ups, self._outs = (buffer(count, width) for width in (inner, inner, hidden))
        self._x = buffer(1, hidden)
        self._ids = graph.input(1, count, dtype=torch.int32)
        order = self._products(stored[0], self._x, gates) + self._products(stored[1], self._x, ups)
        order.append(graph.silu_mul(graph.place(gates), graph.place(ups)))
        graph.finish(*order, *self._products(stored[2], gates, self._outs))

    def _products(self, stored: QuantizedMatrix, x: torch.Tensor, out: torch.Tensor) -> list[Node]:
        """out [K, N] from the experts' matrices [E, N, M] and x [1 or K, M]."""
        graph = self._graph
        weights = graph.weight(stored)
        if graph.indexed(weights):
            return [graph.matmul_id(weights, graph.place(x[None]), self._ids, out)]
        size = stored.nbytes // stored.shape[0]
        first = QuantizedMatrix(stored.data[:size], stored.type_name, stored.shape[1:])
        experts = [graph.weight(first) for _ in range(self._count)]
        self._pointed.append(
            (stored.data.ctypes.data, size, [graph.pointer(expert) for expert in experts])
        )
        rows = [graph.place(row[None]) for row in x.expand(self._count, -1)]
        return [
            graph.matmul(expert, row, out[place : place + 1], indexed=False)
            for place, (expert, row) in enumerate(zip(experts, rows, strict=True))
        ]

    def run(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[1, H]; ids must be in range."""
        chosen = ids[0].tolist()
        for base, size, pointers in self._pointed:
            for expert, pointer in zip(chosen, pointers, strict=True):
                pointer.value = base + expert * size
        self._ids.fill(ids)
        self._x.copy_(hidden.detach())
        self._graph.run()
        if self._graph.spoiled:
            self._outs.fill_(math.nan)
        return torch.mm(weights.float(), self._outs).to(hidden.dtype)


def _by_index(
    ggml: Ggml,
    threads: int,
    stored: Sequence[QuantizedMatrix],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """[T, H]: each of the three steps is one product with all experts' indices."""
    graph = Graph(ggml, threads)
    gate, up, down = (graph.weight(matrices) for matrices in stored)
    x = graph.input(len(hidden), 1, hidden.shape[1])
    chosen = graph.input(*ids.shape, dtype=torch.int32)
    inner = graph.silu_mul(graph.matmul_id(gate, x, chosen), graph.matmul_id(up, x, chosen))
    out = graph.matmul_id(down, inner, chosen)
    graph.finish(out)
    x.fill(hidden[:, None])
    chosen.fill(ids)
    graph.run()
    if graph.spoiled:
        out.value[~(_finite_rows(x.value) & _finite_rows(inner.value))] = math.nan
    return _weighted(out.value, weights, hidden.dtype)


def _by_expert(
    ggml: Ggml,
    threads: int,
    stored: Sequence[QuantizedMatrix],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same from rows sorted by expert: one product for each expert and matrix, which goes
    through tiles.

    Args:
        kept: [T, K] bool: choices that count; all where it is not given.
    """
    flat = ids.reshape(-1)
    if kept is None:
        order = torch.argsort(flat, stable=True)
    else:
        places = kept.reshape(-1).nonzero()[:, 0]
        order = places[torch.argsort(flat[places], stable=True)]
        if not len(order):
            return torch.zeros_like(hidden)
    loads = [
        (expert, load) for expert, load in enumerate(torch.bincount(flat[order]).tolist()) if load
    ]
    graph = Graph(ggml, threads, nodes=9 * len(loads) + 8)
    _, inner, width = stored[0].shape
    gates, ups, outs = (buffer(len(order), size) for size in (inner, inner, width))

    def products(matrices: QuantizedMatrix, x: torch.Tensor, out: torch.Tensor) -> list[Node]:
        size = matrices.nbytes // matrices.shape[0]
        nodes, start = [], 0
        for expert, load in loads:
            rows = slice(start, start + load)
            data = matrices.data[expert * size : (expert + 1) * size]
            weight = graph.weight(QuantizedMatrix(data, matrices.type_name, matrices.shape[1:]))
            nodes.append(graph.matmul(weight, graph.place(x[rows]), out[rows]))
            start += load
        return nodes

    x = hidden.detach().float().index_select(0, order // ids.shape[1])
    first = products(stored[0], x, gates) + products(stored[1], x, ups)
    first.append(graph.silu_mul(graph.place(gates), graph.place(ups)))
    graph.finish(*first, *products(stored[2], gates, outs))
    graph.run()
    if graph.spoiled:
        outs[~(_finite_rows(x) & _finite_rows(gates))] = math.nan
    whole = outs.new_empty(len(flat), width) if kept is None else outs.new_zeros(len(flat), width)
    whole.index_copy_(0, order, outs)
    return _weighted(whole.view(*ids.shape, width), weights, hidden.dtype)


def _finite_rows(values: torch.Tensor) -> torch.Tensor:
    return values.isfinite().all(dim=-1)


def _weighted(outs: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, H] from experts' outputs [T, K, H] and weights [T, K]."""
    return torch.bmm(weights.float()[:, None], outs)[:, 0].to(dtype)


def _parts(tokens: int) -> list[slice]:
    return [slice(start, start + _MAX_TOKENS) for start in range(0, tokens, _MAX_TOKENS)]


def _stacked(matrix: Matrix) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """A graph takes one base address: experts kept apart in the file must be copied together."""
    stacked = matrix.stacked if matrix.stacked is not None else np.concatenate(matrix.experts)
    return stacked.reshape(-1)


def _check(layer: _Layer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    spec = layer.spec
    check_kinds(hidden, ids, weights)
    if hidden.ndim != 2 or hidden.shape[1] != spec.hidden or not len(hidden):
        raise BackendError(
            f"hidden states must be [T, {spec.hidden}] of at least a token, found "
            f"{list(hidden.shape)}"
        )
    if ids.shape != weights.shape or ids.ndim != 2 or len(ids) != len(hidden) or not ids.shape[1]:
        raise BackendError(
            f"ids {list(ids.shape)} and weights {list(weights.shape)} must be [{len(hidden)}, K]"
        )
    if len(ids) == 1:  # plain integers are quicker than four operations on a tensor of two
        chosen = ids[0].tolist()
        low, high, twice = min(chosen), max(chosen), len(set(chosen)) < len(chosen)
    else:
        low, high = (int(value) for value in torch.aminmax(ids))
        twice = ids.shape[1] > 1 and bool((ids.sort(dim=1).values.diff(dim=1) == 0).any())
    if low < 0 or high >= spec.experts:
        raise BackendError(f"expert ids must be 0 to {spec.experts - 1}, found {low} to {high}")
    if twice:  # ggml would leave rows unwritten; no router does this
        raise BackendError("a token names an expert twice")
