"""Functions of torch tensors that ggml graphs compute, on quantised matrices above all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hybrimoe_plugin.compute.cpu.ggml import Ggml, Graph, GraphTensor
from hybrimoe_plugin.compute.gradients import outside_autograd
from hybrimoe_plugin.errors import InputError

Build = Callable[[Graph, GraphTensor], Sequence[GraphTensor]]
"""Adds the operations of a function to a graph: input node -> output nodes."""


class BuiltGraph(NamedTuple):
    """A finished graph with its input and outputs."""

    graph: Graph
    input: GraphTensor
    outputs: Sequence[GraphTensor]


class GgmlFunction:
    """A function computed by ggml graphs, one graph for each number of tokens.

    The graph for a single token is kept, since decode runs it again at every step. Others are built
    for the call: building one costs little next to the products of many tokens.

    Args:
        build: adds the operations to a graph with the given input, and returns the outputs.
        threads: by default torch's number, whose OpenMP pool it is; 1 for work that is too small to
            be shared.
        single_input: [1, M] float32, the memory in which graphs for a single token read their
            input; by default each graph has its own.
        ids: the input is integers, else floating point.
        learned: returns the parameters that the graphs hold as constants; no gradients flow to
            them.
    """

    def __init__(
        self,
        ggml: Ggml,
        build: Build,
        threads: int | None = None,
        single_input: torch.Tensor | None = None,
        ids: bool = False,
        learned: Callable[[], Sequence[torch.Tensor | None]] = tuple,
    ) -> None:
        self._ggml = ggml
        self._build = build
        self._threads = threads
        self._single_input = single_input
        self._ids = ids
        self._learned = learned
        self._kept: dict[int, BuiltGraph] = {}
        """The graph for a single token, for each number of threads: torch has a number for every
        thread that calls it.
        """

    def __call__(self, x: torch.Tensor, tokens: int) -> list[torch.Tensor]:
        """Float32 outputs for x, whose shape depends on the number of tokens alone.

        Tokens for which a product met a NaN or an infinity are NaN. Valid until the next call.
        Backward through the outputs raises BackendError.

        Raises:
            InputError: x is of another shape or type than this function takes.
        """
        self._check_type(x)
        if torch.is_grad_enabled():
            return outside_autograd(
                "a matrix as stored", lambda: self(x, tokens), x, *self._learned()
            )
        built = self._graph_for(x, tokens)
        if x.shape != built.input.shape:
            raise InputError(f"expected values {list(built.input.shape)}, found {list(x.shape)}")
        built.input.fill(x)
        built.graph.run()
        if built.graph.spoiled:
            built.graph.spread_nan(tokens, built.outputs)
        return [output.value for output in built.outputs]

    def _check_type(self, x: torch.Tensor) -> None:
        if x.is_floating_point() is self._ids:
            expected = "whole numbers" if self._ids else "floating point values"
            raise InputError(f"expected {expected}, found {x.dtype}")

    def _graph_for(self, x: torch.Tensor, tokens: int) -> BuiltGraph:
        threads = self._threads or torch.get_num_threads()
        if tokens != 1:
            return self._built(x, threads, kept=False)
        built = self._kept.get(threads)
        if built is None:
            built = self._kept[threads] = self._built(x, threads, kept=True)
        return built

    def _built(self, x: torch.Tensor, threads: int, kept: bool) -> BuiltGraph:
        graph = Graph(self._ggml, threads, kept=kept)
        if kept and self._single_input is not None:
            node = graph.wrap(self._single_input)
        else:
            dtype = torch.int32 if self._ids else torch.float32
            node = graph.input(*x.shape, dtype=dtype)
        outputs = self._build(graph, node)
        graph.finish(*outputs)
        return BuiltGraph(graph, node, outputs)
