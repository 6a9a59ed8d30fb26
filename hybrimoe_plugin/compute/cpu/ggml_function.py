"""Functions of torch tensors that ggml graphs compute, on quantised matrices above all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hybrimoe_plugin.compute.cpu.ggml import Ggml, Graph, GraphTensor
from hybrimoe_plugin.compute.cpu.native.choice import new_graph
from hybrimoe_plugin.compute.cpu.native.graph import AnyGraph, NativeGraph
from hybrimoe_plugin.compute.gradients import outside_autograd
from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.policy.step import FEW_ROWS

KEPT_ROWS = 64
"""Most rows of the kept graphs for several tokens: room for 2, 4, 8, 16 and 32.

With Qwen3-30B-A3B a row takes 61 KB in each layer and 0.6 MB in the head: 230 MB at most,
and 47 KB for each graph.
"""

Build = Callable[[AnyGraph, GraphTensor], Sequence[GraphTensor]]
"""Adds the operations of a function to a graph: input node -> output nodes."""


class BuiltGraph(NamedTuple):
    """A finished graph with its input and outputs."""

    graph: AnyGraph
    input: GraphTensor
    outputs: Sequence[GraphTensor]


class GgmlFunction:
    """A function computed by ggml graphs, one graph for each number of tokens.

    The graph for a single token is kept, since decode runs it again at every step. So are those for
    a few tokens, the last used of them, as long as their buffers have no more than `KEPT_ROWS` rows
    together. Others are built for the call: building one costs little next to the products of many
    tokens.

    Args:
        build: adds the operations to a graph with the given input, and returns the outputs.
        threads: by default torch's number, whose OpenMP pool it is; 1 for work that is too small to
            be shared.
        input_rows: [FEW_ROWS, M] float32, the memory in whose first rows kept graphs read their
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
        input_rows: torch.Tensor | None = None,
        ids: bool = False,
        learned: Callable[[], Sequence[torch.Tensor | None]] = tuple,
    ) -> None:
        self._ggml = ggml
        self._build = build
        self._threads = threads
        self._input_rows = input_rows
        self._ids = ids
        self._learned = learned
        self._kept: dict[tuple[int, int], BuiltGraph] = {}
        """By number of threads and of tokens, the last used one last: torch has a number of threads
        for every thread that calls it.
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
        if tokens > FEW_ROWS:
            return self._built(x, threads, tokens)
        key = threads, tokens
        built = self._kept.get(key)
        if built is not None and (tokens == 1 or key == next(reversed(self._kept))):
            return built
        if built is None:
            built = self._built(x, threads, tokens)
        if tokens != 1:
            self._kept.pop(key, None)  # from here to the end: it is the last used one
            self._make_room(tokens)
        self._kept[key] = built
        return built

    def _make_room(self, tokens: int) -> None:
        """Drop what was not used for longest until a graph for so many tokens may be kept."""
        several = [key for key in self._kept if key[1] > 1]
        rows = tokens + sum(count for _, count in several)
        for key in several:
            if rows <= KEPT_ROWS:
                break
            del self._kept[key]
            rows -= key[1]

    def _built(self, x: torch.Tensor, threads: int, tokens: int) -> BuiltGraph:
        kept = tokens <= FEW_ROWS
        built = self._built_on(new_graph(self._ggml, threads, tokens, kept=kept), x, tokens)
        if isinstance(built.graph, NativeGraph) and built.graph.slower_than_ggml:
            built = self._built_on(Graph(self._ggml, threads, kept=kept), x, tokens)
        return built

    def _built_on(self, graph: AnyGraph, x: torch.Tensor, tokens: int) -> BuiltGraph:
        kept = tokens <= FEW_ROWS
        if kept and self._input_rows is not None:
            node = graph.wrap(self._input_rows[:tokens])
        else:
            dtype = torch.int32 if self._ids else torch.float32
            node = graph.input(*x.shape, dtype=dtype)
        outputs = self._build(graph, node)
        graph.finish(*outputs)
        return BuiltGraph(graph, node, outputs)
