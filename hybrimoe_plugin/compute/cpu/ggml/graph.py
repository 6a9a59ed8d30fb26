"""Build ggml graphs over torch buffers and run them on the calling thread and its OpenMP team.

Such graphs are right for dense linears, and for experts where nothing else computes meanwhile. On
2 cores a matrix of 8192 x 2048 in Q8_0 is read at 19 GB/s with two threads (docs/LOG.md).

ggml ends the process on what it does not know, so types and shapes are checked here first.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from hybrimoe_plugin.compute.cpu.ggml.binding import F32, I32, GgmlBinding
from hybrimoe_plugin.compute.cpu.ggml.execution import Execution
from hybrimoe_plugin.compute.cpu.ggml.kernel_speed import KernelSpeed
from hybrimoe_plugin.compute.cpu.ggml.rounding_watch import RoundingWatch
from hybrimoe_plugin.compute.cpu.ggml.tensor import (
    FLOATS,
    GraphTensor,
    buffer,
    bytes_of_row,
    check_stored,
    norm_epsilon_fits,
    require,
)
from hybrimoe_plugin.compute.cpu.ggml.thread_team import ThreadTeam
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix


class GraphRuntime(Protocol):
    """What a graph needs of `Ggml`."""

    @property
    def binding(self) -> GgmlBinding: ...

    @property
    def team(self) -> ThreadTeam: ...

    def kernel_speed(self, type_name: str, threads: int) -> KernelSpeed: ...


class Graph:
    """A few operations on fixed buffers, built once and run often.

    Not for use from two threads at once.

    Args:
        threads: the calling thread and this many less one of OpenMP's.
        kept: it will run often; then its times tell whether the team is disturbed.
        nodes: most tensors that it may have, inputs and weights included.

    Attributes:
        spoiled: whether a product of the last run rounded a NaN or an infinity; the outputs that
            depend on it are meaningless then.
    """

    def __init__(
        self, ggml: GraphRuntime, threads: int, kept: bool = False, nodes: int = 48
    ) -> None:
        self.spoiled = False
        self._ggml = ggml
        self._binding = ggml.binding
        self._threads = threads
        self._runs_often = kept
        self._most_tensors = nodes
        self._tensors = 0
        self._memory = np.empty(self._binding.context_bytes(nodes), np.uint8)
        self._context = self._binding.new_context(self._memory)
        if not self._context:
            raise BackendError(
                "ggml has no context left: more than 64 graphs are being built at once"
            )
        self._referenced: list[Any] = []
        """Memory that ggml holds addresses of."""
        self._watch = RoundingWatch()
        self._index_zero: GraphTensor | None = None
        """The index of the only matrix, for `matmul_id` with one."""
        self._execution: Execution | None = None

    def input(self, *shape: int, dtype: torch.dtype = torch.float32) -> GraphTensor:
        """A buffer that the caller fills: float32, or int32 for ids."""
        kind = F32 if dtype == torch.float32 else I32
        pointer = self._new_tensor(kind, shape)
        return self._result(pointer, shape, buffer(*shape, dtype=dtype))

    def weight(self, stored: QuantizedMatrix) -> GraphTensor:
        """Stored bytes, read in place.

        Raises:
            BackendError: a type that was not tried, or bytes that do not fit the shape.
        """
        check_stored(stored)
        kind, shape = int(GGMLQuantizationType[stored.type_name]), stored.shape
        pointer = self._strided(kind, stored) if stored.stride else self._new_tensor(kind, shape)
        self._set_data(pointer, stored.data.ctypes.data)
        self._referenced.append(stored)
        return GraphTensor(pointer, shape, None, stored.type_name)

    def wrap(self, memory: torch.Tensor) -> GraphTensor:
        """A tensor in the caller's memory, float32 and contiguous.

        If an operation writes that memory, it must belong to an earlier output.
        """
        assert memory.dtype == torch.float32
        assert memory.is_contiguous() and memory.device.type == "cpu"
        shape = tuple(memory.shape)
        return self._result(self._new_tensor(F32, shape), shape, memory)

    def wrap_ids(self, memory: torch.Tensor) -> GraphTensor:
        """The same for ids [..., K] int32."""
        return self._result(self._new_tensor(I32, memory.shape), tuple(memory.shape), memory)

    def constant(self, values: torch.Tensor) -> GraphTensor:
        """One of the model's own vectors [M] as [1, M] float32; not copied if it is float32."""
        return self.wrap(values.detach().float()[None])

    def pointer(self, tensor: GraphTensor) -> ctypes.c_uint64:
        """Where a tensor's data pointer is kept; set its `value` to let the next run read there."""
        return ctypes.c_uint64.from_address(tensor.pointer + self._binding.data_offset)

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
            indexed: whether a single matrix and row go through `matmul_id`; None for the faster
                way.

        Raises:
            BackendError: shapes that do not fit.
        """
        columns = weight.shape[-1]
        batch_fits = weight.shape[:-2] in ((), x.shape[:-2])
        require(columns == x.shape[-1] and batch_fits, "a product", weight, x)
        self._watch_input(weight, x)
        shape = (*x.shape[:-1], weight.shape[-2])
        if x.shape == (1, columns):
            indexed = self.indexed(weight) if indexed is None else indexed
            if indexed:
                return self._matmul_id(weight, x, self._zero(), shape, out)
        pointer = self._binding.matmul(self._context, weight.pointer, x.pointer)
        return self._result(pointer, shape, out)

    def indexed(self, weight: GraphTensor) -> bool:
        """Whether one row is multiplied faster through `matmul_id` by matrices of this type."""
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
            BackendError: shapes that do not fit.
        """
        fits = len(weights.shape) == len(x.shape) == 3 and weights.shape[-1] == x.shape[-1]
        fits = fits and x.shape[0] == ids.shape[0] and x.shape[1] in (1, ids.shape[1])
        require(fits, "a product", weights, x, ids)
        self._watch_input(weights, x)
        return self._matmul_id(weights, x, ids, (*ids.shape, weights.shape[-2]), out)

    def rows(self, weight: GraphTensor, ids: GraphTensor) -> GraphTensor:
        """[T, M] float32: rows of weight [N, M] for ids [T] int32, which must be in range.

        Raises:
            BackendError: shapes that do not fit, or ids of another type.
        """
        fits = len(weight.shape) == 2 and len(ids.shape) == 1
        require(fits and ids.value.dtype == torch.int32, "rows", weight, ids)
        pointer = self._binding.get_rows(self._context, weight.pointer, ids.pointer)
        return self._result(pointer, (*ids.shape, weight.shape[-1]))

    def silu_mul(self, gate: GraphTensor, up: GraphTensor) -> GraphTensor:
        """silu(gate) * up, in gate's buffer. Raises: BackendError: different shapes."""
        require(gate.shape == up.shape, "a gated product", gate, up)
        activated = self._binding.silu(self._context, gate.pointer)
        self._set_data(activated, gate.value.data_ptr())
        pointer = self._binding.mul(self._context, activated, up.pointer)
        return self._result(pointer, gate.shape, gate.value)

    def add(self, x: GraphTensor, y: GraphTensor) -> GraphTensor:
        """x + y, in x's buffer, for x [..., M] and y [..., M] or [1, M].

        Raises:
            BackendError: other shapes.
        """
        require(y.shape in (x.shape, (1, x.shape[-1])), "a sum", x, y)
        pointer = self._binding.add(self._context, x.pointer, y.pointer)
        return self._result(pointer, x.shape, x.value)

    def view(self, tensor: GraphTensor, part: torch.Tensor) -> GraphTensor:
        """A part of a tensor's buffer, given as torch's view of it.

        Up to three dimensions, the last one dense.
        """
        whole = part[(None,) * (3 - part.ndim)]
        outer, middle, inner = (4 * stride for stride in whole.stride())
        assert inner == 4 and part.dtype == torch.float32
        offset = part.data_ptr() - tensor.value.data_ptr()
        innermost_first = reversed(whole.shape)
        pointer = self._binding.view(
            self._context, tensor.pointer, *innermost_first, middle, outer, offset
        )
        return self._result(pointer, tuple(part.shape), part)

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
        if rows == 1:
            for output in outputs:
                output.value.fill_(math.nan)
            return
        spoiled = self._watch.spoiled_rows(rows)
        for output in outputs:
            output.value[..., spoiled, :] = math.nan

    def _watch_input(self, weight: GraphTensor, x: GraphTensor) -> None:
        """Look at x after every run, if products with this weight round it."""
        if weight.type_name not in FLOATS:
            self._watch.add(x.value)

    def _zero(self) -> GraphTensor:
        if self._index_zero is None:
            self._index_zero = self.input(1, 1, dtype=torch.int32)
            self._index_zero.value.zero_()
        return self._index_zero

    def _matmul_id(
        self,
        weights: GraphTensor,
        x: GraphTensor,
        ids: GraphTensor,
        shape: tuple[int, ...],
        out: torch.Tensor | None,
    ) -> GraphTensor:
        pointer = self._binding.matmul_id(self._context, weights.pointer, x.pointer, ids.pointer)
        return self._result(pointer, shape, out)

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._free_context()

    def _free_context(self) -> None:
        # First forgotten, then freed: an interrupt between the two loses one place. The other
        # order would free it twice.
        context, self._context = self._context, None
        self._binding.free(context)

    def _new_tensor(self, kind: int, shape: tuple[int, ...]) -> int:
        return self._binding.new_tensor(self._context, kind, shape)

    def _strided(self, kind: int, stored: QuantizedMatrix) -> int:
        """A stack [E, N, M] whose matrices lie apart, as a view of one with more rows."""
        experts, rows, columns = stored.shape
        row_bytes = bytes_of_row(stored.type_name, columns)
        whole = self._new_tensor(kind, (experts, stored.stride // row_bytes, columns))
        self._set_data(whole, stored.data.ctypes.data)
        view = (columns, rows, experts, row_bytes, stored.stride, 0)
        return int(self._binding.view(self._context, whole, *view))

    def _result(
        self, pointer: int, shape: tuple[int, ...], memory: torch.Tensor | None = None
    ) -> GraphTensor:
        """A tensor with its memory, which is new where none is given."""
        memory = buffer(*shape) if memory is None else memory
        self._set_data(pointer, memory.data_ptr())
        self._referenced.append(memory)
        return GraphTensor(pointer, shape, memory)

    def _set_data(self, pointer: int, address: int) -> None:
        self._tensors += 1
        assert self._tensors <= self._most_tensors, (
            f"a graph of {self._most_tensors} tensors has one more"
        )
        kept_at = pointer + self._binding.data_offset
        ctypes.c_uint64.from_address(kept_at).value = address
