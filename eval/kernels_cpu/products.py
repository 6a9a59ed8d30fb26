"""Time products of one row with many matrices that lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from hybrimoe_plugin.compute.cpu.ggml import Ggml, buffer
from hybrimoe_plugin.compute.cpu.native.choice import new_graph
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_TENSORS_EACH = 4
"""A product's most tensors in a graph."""
_SHARED_TENSORS = 16


def product_us(
    ggml: Ggml, matrices: Sequence[QuantizedMatrix], threads: int, repeats: int
) -> list[float]:
    """Time of one product in µs, in each pass over all matrices.

    A pass is one graph, in which each product is built as the operators' are; with hundreds of them
    a graph's own start does not count. Compiled operations share out all products of a pass at
    once, as they do a layer's that do not depend on each other.

    Args:
        matrices: of one type and shape [N, M].
        repeats: passes, after one that is not timed.

    Raises:
        BackendError: a type without a kernel.
    """
    ggml.require(matrices[0].type_name)
    rows, columns = matrices[0].shape
    nodes = _TENSORS_EACH * len(matrices) + _SHARED_TENSORS
    graph = new_graph(ggml, threads, 1, nodes=nodes)
    x = graph.wrap(torch.randn(1, columns, generator=torch.Generator().manual_seed(0)))
    out = buffer(1, rows)
    graph.finish(*[graph.matmul(graph.weight(stored), x, out) for stored in matrices])
    graph.run()
    times = []
    for _ in range(repeats):
        started = perf_counter()
        graph.run()
        times.append(1e6 * (perf_counter() - started) / len(matrices))
    return times
