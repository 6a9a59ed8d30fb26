"""Build ggml graphs over torch buffers and run them on the calling thread and its OpenMP team.

Such graphs are right for dense linears, and for experts where nothing else computes meanwhile. On
2 cores a matrix of 8192 x 2048 in Q8_0 is read at 19 GB/s with two threads (docs/LOG.md).

ggml ends the process on what it does not know, so types and shapes are checked here first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrimoe_plugin.compute.cpu.ggml.execution import Execution
from hybrimoe_plugin.compute.cpu.ggml.graph_tensors import GraphTensors
from hybrimoe_plugin.compute.cpu.ggml.rounding_watch import RoundingWatch
from hybrimoe_plugin.compute.cpu.ggml.runtime import GraphRuntime
from hybrimoe_plugin.compute.cpu.ggml.tensor import (
    FLOATS,
    GraphTensor,
    buffer,
    norm_epsilon_fits,
    require,
    require_form,
)
from hybrimoe_plugin.errors import BackendError


class Graph(GraphTensors):
    """A few operations on fixed buffers, built once and run often.

    Not for use from two threads at once.

    Args:
        threads: the calling thread and this many less one of OpenMP's.
        kept: it will run often; then its times tell whether the team is disturbed.
        nodes: most tensors that it may have, inputs and weights included.
        watched: whether runs look for what a product rounds, at all memory that products read.

    Attributes:
        spoiled: whether a product of the last run rounded a NaN or an infinity; the outputs that
            depend on it are meaningless then.
    """

    def __init__(
        self,
        ggml: GraphRuntime,
        threads: int,
        kept: bool = False,
        nodes: int = 48,
        watched: bool = True,
    ) -> None:
        super().__init__(ggml, nodes)
        self.spoiled = False
        self._threads = threads
        self._runs_often = kept
        self._watched = watched
        self._watch = RoundingWatch()
        self._counts: dict[tuple[int, int], GraphTensor] = {}
        """Ids for `matmul_id` of products that have none of their own, by their shape."""
        self._execution: Execution | None = None

    def matmul(
        self,
        weight: GraphTensor,
        x: GraphTensor,
        out: torch.Tensor | None = None,
        indexed: bool | None = None,
    ) -> GraphTensor:
        """[..., T, N] from weight [..., N, M] and x [..., T, M].

        Args:
            out: where the result goes; by default into memory of its own.
            indexed: whether it goes through `matmul_id`; None for the way that is right for the
                type and, with one row, the faster one.

        Raises:
            BackendError: shapes that do not fit, or a form that gives wrong values.
        """
        columns = weight.shape[-1]
        batch_fits = weight.shape[:-2] in ((), x.shape[:-2])
        require(columns == x.shape[-1] and batch_fits, "a product", weight, x)
        single = x.shape == (1, columns)
        if indexed is None:
            indexed = self.indexed(weight) if single else not self._plain_is_right(weight, x)
        self._watch_input(weight, x)
        shape = (*x.shape[:-1], weight.shape[-2])
        if not indexed:
            return self._plain(weight, x, shape, out)
        if single:
            return self._indexed(weight, x, self._counted(1, 1), shape, out)
        return self._rows_indexed(weight, x, out)

    def indexed(self, weight: GraphTensor) -> bool:
        """Whether one row is to be multiplied through `matmul_id` by matrices of this type."""
        return self._ggml.kernel_speed(weight.type_name, self._threads).indexed

    def matmul_id(
        self,
        weights: GraphTensor,
        x: GraphTensor,
        ids: GraphTensor,
        out: torch.Tensor | None = None,
    ) -> GraphTensor:
        """[T, K, N] from weights [E, N, M], x [T, 1 or K, M] and ids [T, K] int32.

        Ids must be in range.

        Args:
            out: where the result goes; by default into memory of its own.

        Raises:
            BackendError: shapes that do not fit, or a type whose indexed products are wrong.
        """
        fits = len(weights.shape) == len(x.shape) == 3 and weights.shape[-1] == x.shape[-1]
        fits = fits and x.shape[0] == ids.shape[0] and x.shape[1] in (1, ids.shape[1])
        require(fits, "a product", weights, x, ids)
        self._watch_input(weights, x)
        return self._indexed(weights, x, ids, (*ids.shape, weights.shape[-2]), out)

    def rows(self, weight: GraphTensor, ids: GraphTensor) -> GraphTensor:
        """[T, M] float32: rows of weight [N, M] for ids [T] int32, which must be in range.

        Raises:
            BackendError: shapes that do not fit, ids of another type, or a type that is
                dequantised wrongly.
        """
        fits = len(weight.shape) == 2 and len(ids.shape) == 1
        require(fits and ids.value.dtype == torch.int32, "rows", weight, ids)
        require_form(self._ggml.forms(weight.type_name).lookup, "rows", weight)
        pointer = self._binding.get_rows(self._context, weight.pointer, ids.pointer)
        return self._result(pointer, (*ids.shape, weight.shape[-1]))

    def silu_mul(self, gate: GraphTensor, up: GraphTensor) -> GraphTensor:
        """silu(gate) * up, in gate's buffer. Raises: BackendError: different shapes."""
        require(gate.shape == up.shape, "a gated product", gate, up)
        return self.multiply(self.silu(gate), up)

    def silu(self, x: GraphTensor) -> GraphTensor:
        """silu(x), in x's buffer."""
        pointer = self._binding.silu(self._context, x.pointer)
        return self._result(pointer, x.shape, x.value)

    def multiply(self, x: GraphTensor, y: GraphTensor) -> GraphTensor:
        """x * y, in x's buffer. Raises: BackendError: different shapes."""
        require(x.shape == y.shape, "a product of each value", x, y)
        pointer = self._binding.mul(self._context, x.pointer, y.pointer)
        return self._result(pointer, x.shape, x.value)

    def add(self, x: GraphTensor, y: GraphTensor) -> GraphTensor:
        """x + y, in x's buffer, for x [..., M] and y [..., M] or [1, M].

        Raises:
            BackendError: other shapes.
        """
        require(y.shape in (x.shape, (1, x.shape[-1])), "a sum", x, y)
        pointer = self._binding.add(self._context, x.pointer, y.pointer)
        return self._result(pointer, x.shape, x.value)

    def rms_norm(
        self, x: GraphTensor, weight: GraphTensor, eps: float, out: torch.Tensor | None = None
    ) -> GraphTensor:
        """x / rms(x) * weight, [..., M], for a weight [1, M].

        Args:
            out: where the result goes; by default into memory of its own.

        Raises:
            BackendError: shapes that do not fit, or an epsilon for which `norm_epsilon_fits` is
                false.
        """
        require(weight.shape == (1, x.shape[-1]), "a norm", weight, x)
        if not norm_epsilon_fits(eps):
            raise BackendError(
                f"ggml's norm needs a finite epsilon above 0 in float32, found {eps}"
            )
        out = buffer(*x.shape) if out is None else out
        normed = self._binding.rms_norm(self._context, x.pointer, eps)
        self._set_data(normed, out.data_ptr())
        pointer = self._binding.mul(self._context, normed, weight.pointer)
        return self._result(pointer, x.shape, out)

    def finish(self, *outputs: GraphTensor) -> None:
        """Close the graph: nothing can be added after. Outputs are computed in this order."""
        graph = self._binding.new_graph(self._context, self._most_tensors, False)
        for output in outputs:
            self._binding.expand(graph, output.pointer)
        self._execution = Execution(
            self._binding, graph, self._threads, self._ggml.team, self._runs_often
        )
        # The structures lie in our own memory: giving the context back only frees its place among
        # ggml's 64.
        self._free_context()

    def run(self) -> None:
        """Compute every output; look at `spoiled` after it.

        Raises:
            BackendError: ggml failed.

        Mutates: the tensors' buffers.
        """
        assert self._execution is not None, "finish() comes first"
        self._execution.run()
        self.spoiled = self._watch.spoiled()

    def spread_nan(self, rows: int, outputs: Sequence[GraphTensor]) -> None:
        """Make rows of outputs NaN where a product met a NaN or an infinity, as float32 would.

        Args:
            rows: how many the graph computes; dimension -2 of activations and outputs where it is
                more than one.
        """
        self._watch.spread_nan(rows, [output.value for output in outputs])

    def _watch_input(self, weight: GraphTensor, x: GraphTensor) -> None:
        """Look at x after every run, if products with this weight round it."""
        if self._watched and weight.type_name not in FLOATS:
            self._watch.add(x.value)

    def _counted(self, tokens: int, batch: int) -> GraphTensor:
        """Ids [T, B]: each token takes all B matrices in turn."""
        ids = self._counts.get((tokens, batch))
        if ids is None:
            ids = self._counts[tokens, batch] = self.input(tokens, batch, dtype=torch.int32)
            ids.fill(torch.arange(batch, device="cpu").expand(tokens, batch))
        return ids

    def _plain_is_right(self, weight: GraphTensor, x: GraphTensor) -> bool:
        forms = self._ggml.forms(weight.type_name)
        return forms.row if x.shape[-2] == 1 else forms.rows

    def _rows_indexed(
        self, weight: GraphTensor, x: GraphTensor, out: torch.Tensor | None
    ) -> GraphTensor:
        """`matmul` of x [T, M] or [B, T, M] as that of T tokens, each of which takes B experts."""
        values = x.value.view(x.shape)
        by_batch = values[None] if values.ndim == 2 else values
        batch, tokens, _ = by_batch.shape
        each_its_own = len(weight.shape) == 3 or batch == 1
        same_order = out is None or 1 in (batch, tokens)
        require(each_its_own and same_order, "an indexed product", weight, x)
        by_token = self.view(x, by_batch.transpose(0, 1))
        ids = self._counted(tokens, batch)
        product = self._indexed(weight, by_token, ids, (tokens, batch, weight.shape[-2]), out)
        found = product.value.view(product.shape).transpose(0, 1)
        return self.view(product, found.view(*x.shape[:-1], -1))

    def _plain(
        self,
        weight: GraphTensor,
        x: GraphTensor,
        shape: tuple[int, ...],
        out: torch.Tensor | None,
    ) -> GraphTensor:
        require_form(self._plain_is_right(weight, x), "plain products", weight)
        pointer = self._binding.matmul(self._context, weight.pointer, x.pointer)
        return self._result(pointer, shape, out)

    def _indexed(
        self,
        weights: GraphTensor,
        x: GraphTensor,
        ids: GraphTensor,
        shape: tuple[int, ...],
        out: torch.Tensor | None,
    ) -> GraphTensor:
        right = self._ggml.forms(weights.type_name).indexed
        require_form(right, "indexed products", weights)
        pointer = self._binding.matmul_id(self._context, weights.pointer, x.pointer, ids.pointer)
        return self._result(pointer, shape, out)
