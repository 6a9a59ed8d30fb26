"""One token through a decoder layer up to its router, as one graph of compiled operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import GrowingLayer, use_growing_layer
from hybrimoe_plugin.compute.attention.sequences import rows_of
from hybrimoe_plugin.compute.cpu.ggml import Ggml, GraphTensor, buffer
from hybrimoe_plugin.compute.cpu.native.choice import kernels_of
from hybrimoe_plugin.compute.cpu.native.graph import NativeGraph
from hybrimoe_plugin.compute.cpu.native.token_attention import AttendedCache

Build = Callable[[NativeGraph, GraphTensor], tuple[list[GraphTensor], AttendedCache]]
"""Adds a layer to a graph, from its input [1, H]: outputs, and the cache that is to be named."""


class NativeStep:
    """A layer whose attention is in its graph.

    Args:
        layer: its number, under which caches have its entries.
        width: H.
        build: adds it to a graph.
    """

    def __init__(self, ggml: Ggml, layer: int, width: int, build: Build) -> None:
        self._ggml = ggml
        self._layer = layer
        self._build = build
        self._x = buffer(1, width)
        self._built: tuple[int, NativeGraph, list[torch.Tensor], AttendedCache] | None = None
        """The number of threads that it was built for, the graph, its outputs, its cache."""

    def __call__(self, hidden: torch.Tensor, cache: Any) -> list[torch.Tensor] | None:
        """The layer's outputs from [1, 1, H], valid until the next call.

        None, and nothing done, where the cache is of another kind. Mutates: the cache.
        """
        if hidden.shape[1:] != self._x.shape:
            return None  # refused by the graphs before and behind the cache
        kept = self._kept(cache)
        if kept is None:
            return None
        graph, outputs, attended = self._graph()
        keys, values = kept.reserve()
        if not attended.fits(keys, values):
            return None  # as of another model's: torch's attention refuses it
        attended.set(keys, values, kept.get_seq_length())
        self._x.copy_(hidden[0])
        graph.run()
        kept.advance()
        return outputs

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

    def _graph(self) -> tuple[NativeGraph, list[torch.Tensor], AttendedCache]:
        threads = torch.get_num_threads()
        if self._built is None or self._built[0] != threads:
            kernels = kernels_of(self._ggml)
            assert kernels is not None
            graph = NativeGraph(self._ggml, kernels, threads)
            outputs, cache = self._build(graph, graph.wrap(self._x))
            graph.finish()
            self._built = threads, graph, [output.value for output in outputs], cache
        return self._built[1:]
