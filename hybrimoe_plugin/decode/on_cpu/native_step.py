"""One token through a decoder layer, or through its part up to the router, in one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import GrowingLayer, use_growing_layer
from hybrimoe_plugin.compute.attention.sequences import rows_of
from hybrimoe_plugin.compute.cpu.ggml import Ggml, GraphTensor
from hybrimoe_plugin.compute.cpu.native.choice import kernels_of
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph
from hybrimoe_plugin.compute.cpu.native.token_attention import AttendedCache

Build = Callable[[NativeGraph, GraphTensor], tuple[list[GraphTensor], AttendedCache]]
"""Adds a layer to a graph, from its input [1, H]: outputs, and the cache that is to be named."""


class NativeStep:
    """A layer's graph, attention among it.

    Args:
        layer: its number, under which caches have its entries.
        x: [1, H], the memory that it reads.
        build: adds the layer to a graph.

    Attributes:
        x: may be set until the first call.
    """

    def __init__(self, ggml: Ggml, layer: int, x: torch.Tensor, build: Build) -> None:
        self._ggml = ggml
        self._layer = layer
        self._build = build
        self.x = x
        self._threads = 0
        self._graph: NativeGraph | None = None
        self._outputs: list[torch.Tensor] = []
        self._attended: AttendedCache | None = None

    def __call__(self, hidden: torch.Tensor, cache: Any) -> list[torch.Tensor] | None:
        """The layer's outputs from [1, 1, H], valid until the next call.

        None, and nothing done, where the cache is of another kind. Mutates: the cache.
        """
        kept = self.prepare(hidden, cache)
        if kept is None:
            return None
        self.x.copy_(hidden[0])
        self.graph.run()
        kept.advance()
        return self._outputs

    @property
    def graph(self) -> NativeGraph:
        """As `prepare` left it."""
        assert self._graph is not None, "prepare() comes first"
        return self._graph

    def prepare(self, hidden: torch.Tensor, cache: Any) -> GrowingLayer | None:
        """Let the graph's next run read a cache, and write the new entry there.

        Args:
            hidden: [1, 1, H], of which only the shape counts.

        Returns:
            What is to `advance` after the run; None where the cache is of another kind, or a shape
            is wrong, which torch's operations refuse.
        """
        if hidden.shape[1:] != self.x.shape:
            return None
        kept = self._kept(cache)
        if kept is None:
            return None
        keys, values = kept.reserve()
        self.make_graph()
        assert self._attended is not None
        if not self._attended.fits(keys, values):
            return None
        self._attended.set(keys, values, kept.get_seq_length())
        return kept

    def _kept(self, cache: Any) -> GrowingLayer | None:
        """What the cache holds of this layer, if that is in memory of our own."""
        if cache is None or rows_of(cache, self._layer) is not None:
            return None
        use_growing_layer(cache, self._layer)
        layers = getattr(cache, "layers", ())
        kept = layers[self._layer] if self._layer < len(layers) else None
        if type(kept) is not GrowingLayer or not kept.get_seq_length():
            return None
        return kept

    def make_graph(self) -> None:
        """Build the graph for torch's present number of threads."""
        threads = torch.get_num_threads()
        if self._graph is not None and self._threads == threads:
            return
        kernels = kernels_of(self._ggml)
        assert kernels is not None
        self._graph = None  # the parts that are built below hold its successor's memory
        graph = NativeGraph(self._ggml, kernels, threads)
        outputs, self._attended = self._build(graph, graph.wrap(self.x))
        graph.finish()
        self._outputs = [output.value for output in outputs]
        self._graph, self._threads = graph, threads
