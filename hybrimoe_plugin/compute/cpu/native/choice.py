"""Which kind of graph computes a call: compiled operations, or ggml's own graphs."""

from __future__ import annotations

from hybrimoe_plugin.compute.cpu.ggml import Ggml, Graph
from hybrimoe_plugin.compute.cpu.native.graph import AnyGraph, NativeGraph
from hybrimoe_plugin.compute.cpu.native.kernels import Kernels, compiled

TILED_ROWS = 12
"""Rows from which tiles are faster than ggml's products (docs/LOG.md)."""


def kernels_of(ggml: Ggml) -> Kernels | None:
    """The compiled operations; None where they were not compiled, or are not to be used."""
    if not compiled() or not ggml.operations:
        return None
    return ggml.companion(Kernels)


def takes(kernels: Kernels | None, rows: int) -> bool:
    """Whether the operations are the fastest for products of so many rows."""
    return kernels is not None and (rows == 1 or (kernels.tiles and rows >= TILED_ROWS))


def new_graph(ggml: Ggml, threads: int, rows: int, kept: bool = False, nodes: int = 48) -> AnyGraph:
    """An empty graph for products of so many rows.

    Args:
        kept, nodes: as for `Graph`.
    """
    kernels = kernels_of(ggml)
    if kernels is not None and takes(kernels, rows):
        return NativeGraph(ggml, kernels, threads)
    return Graph(ggml, threads, kept=kept, nodes=nodes)
