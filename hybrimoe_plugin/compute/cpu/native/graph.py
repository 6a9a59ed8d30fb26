"""Graphs of compiled operations, with the interface of ggml's `Graph`.

    matmul(gate, x), matmul(up, x), silu_mul, matmul(down, inner)

    operation     convert x | gate and up | silu * up | convert inner | down
    chunks            1     |    24       |     1     |       1       |  12

Products that follow each other and do not depend on each other are one operation. Activations are
converted once for all products that take them in the same type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.ggml.graph import Graph
from hybrimoe_plugin.compute.cpu.ggml.tensor import (
    GraphTensor,
    buffer,
    norm_epsilon_fits,
    require,
    require_form,
)
from hybrimoe_plugin.compute.cpu.native.kernels import (
    operations,
)
from hybrimoe_plugin.compute.cpu.native.product_steps import matrix_of
from hybrimoe_plugin.compute.cpu.native.rule import Rule
from hybrimoe_plugin.compute.cpu.native.steps import ProductsStep, Step
from hybrimoe_plugin.compute.cpu.native.structures import (
    Attention,
    Choice,
    LookUp,
    Pointing,
    Rotation,
    Rows,
    WeightedSum,
)
from hybrimoe_plugin.compute.cpu.native.tensor_steps import TensorSteps
from hybrimoe_plugin.compute.cpu.native.token_attention import AttendedCache, Rotating
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix


class NativeGraph(TensorSteps):
    """Operations on fixed buffers, built once and run often.

    Args:
        threads: that work on it, the caller's among them.

    Attributes:
        spoiled: always False. What depends on a NaN or an infinity is NaN by itself.
    """

    spoiled = False

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
            indexed: for ggml's graphs.

        Raises:
            BackendError: shapes that do not fit, or a type that is dequantised wrongly.
        """
        columns = weight.shape[-1]
        batch_fits = weight.shape[:-2] in ((), x.shape[:-2])
        require(columns == x.shape[-1] and batch_fits, "a product", weight, x)
        out = buffer(*x.shape[:-1], weight.shape[-2]) if out is None else out
        target = out.view(*x.shape[:-1], weight.shape[-2])
        forms = self._ggml.forms(weight.type_name)
        require_form(forms.lookup or weight.stored is None, "products", weight)
        kernels = self._kernels.of(weight.type_name, dot=forms.indexed)
        self._add_products(weight, x.value.view(x.shape), target, kernels)
        return self._tensor(target)

    def matmul_chosen(
        self,
        like: QuantizedMatrix,
        addresses: NDArray[np.int64],
        ids: GraphTensor,
        x: GraphTensor,
        out: torch.Tensor,
    ) -> GraphTensor:
        """[K, N]: each row of x [K, M], or the only one, times the matrix of its expert.

        Args:
            like: an expert's matrix [N, M].
            addresses: [E], of those of all experts, which the caller keeps.
            ids: [K] int32; must be in range when the graph runs.
            out: [K, N], where the result goes.
        """
        top_k = ids.shape[0]
        rows = x.value.expand(top_k, -1)
        weight = self.weight(like)
        for place in range(top_k):
            # One row each: a view of all would be a single product.
            row = self._tensor(rows[place : place + 1])
            self.matmul(weight, row, out[place : place + 1])
        step = self._steps[-1]
        assert isinstance(step, ProductsStep)
        pointing = Pointing(ids.value.data_ptr(), addresses.ctypes.data, None, top_k)
        self._referenced.append(addresses)
        self._pointings.append((pointing, step, len(step.products) - top_k))
        self._steps.insert(len(self._steps) - 1, Step(operations.point, 1, pointing))
        return self._tensor(out)

    def choose(
        self,
        logits: GraphTensor,
        top_k: int,
        rule: Rule,
    ) -> tuple[GraphTensor, GraphTensor]:
        """A router's choice by logits [1, E]: ids [K] int32, weights [1, K]."""
        require(top_k <= logits.shape[-1], f"a choice of {top_k}", logits)
        ids, weights = self.input(top_k, dtype=torch.int32), self.input(1, top_k)
        scores = buffer(*logits.shape)
        correction = rule.correction
        data = Choice(
            logits.value.data_ptr(),
            None if correction is None else correction.data_ptr(),
            scores.data_ptr(),
            ids.value.data_ptr(),
            weights.value.data_ptr(),
            logits.shape[-1],
            top_k,
            rule.is_sigmoid,
            rule.is_normalised,
            rule.scale,
        )
        self._referenced += [scores, correction]
        self._add(operations.choose, 1, data, weights.value)
        return ids, weights

    def note_time(self) -> ctypes.c_int64:
        """A value that each run sets to the time at this place, in ns as of `perf_counter_ns`."""
        noted = ctypes.c_int64()
        self._steps.append(Step(operations.note_time, 1, noted))
        return noted

    def weighted_sum(self, values: GraphTensor, weights: GraphTensor) -> GraphTensor:
        """[1, W]: the sum of values [K, W] by weights [1, K]."""
        top_k, width = values.shape
        require(weights.shape == (1, top_k), "a weighted sum", values, weights)
        out = buffer(1, width)
        places = torch.arange(top_k, device="cpu")
        data = WeightedSum(
            weights.value.data_ptr(),
            values.value.data_ptr(),
            places.data_ptr(),
            out.data_ptr(),
            top_k,
            width,
        )
        self._referenced.append(places)
        self._add(operations.weighted_sum, 1, data, out)
        return self._tensor(out)

    def rotate(self, x: GraphTensor, rotation: Rotating, out: torch.Tensor | None) -> GraphTensor:
        """The rotary embedding of x [..., D], in memory of its own or in `out`."""
        inputs = _rows(x.value)
        out = buffer(*x.shape) if out is None else out
        outputs = _rows(out)
        data = Rotation(
            inputs.data_ptr(),
            outputs.data_ptr(),
            inputs.stride(0),
            outputs.stride(0),
            *(part.data_ptr() for part in rotation),
            inputs.shape[1],
        )
        self._referenced += [inputs, outputs, rotation]
        self._add(operations.rotate, len(inputs), data, out)
        return self._tensor(out)

    def attend(
        self,
        query: torch.Tensor,
        key: GraphTensor,
        value: GraphTensor | None,
        key_heads: int,
        value_width: int,
        scaling: float,
    ) -> tuple[GraphTensor, AttendedCache]:
        """Attention of one token over a cache that is named before each run: [heads, W].

        Args:
            query: [heads, D], those of a key head side by side.
            key: [key heads x D], the token's own.
            value: [key heads x W]; None where the first W values of keys are the values.
        """
        heads, width = query.shape
        out = buffer(heads, value_width)
        data = Attention(
            query=query.data_ptr(),
            key=key.value.data_ptr(),
            value=None if value is None else value.value.data_ptr(),
            key_heads=key_heads,
            group=heads // key_heads,
            width=width,
            value_width=value_width,
            out=out.data_ptr(),
            scaling=scaling,
        )
        self._referenced += [query, key, value]
        self._add(operations.append, 1, data, out)
        self._add(operations.attend_block, 1, data, out)
        cache = AttendedCache(data, len(self._steps) - 1)
        self._caches.append(cache)
        self._add(operations.merge_blocks, heads, data, out)
        return self._tensor(out), cache

    def rows(self, weight: GraphTensor, ids: GraphTensor) -> GraphTensor:
        """[T, M] float32: rows of weight [N, M] for ids [T] int32, which must be in range.

        Raises:
            BackendError: shapes that do not fit, ids of another type, or a type that is
                dequantised wrongly.
        """
        fits = len(weight.shape) == 2 and len(ids.shape) == 1 and weight.stored is not None
        require(fits and ids.value.dtype == torch.int32, "rows", weight, ids)
        require_form(self._ggml.forms(weight.type_name).lookup, "rows", weight)
        out = buffer(*ids.shape, weight.shape[-1])
        kind = self._kernels.of(weight.type_name).kind
        data, stride = matrix_of(weight, 0)
        look_up = LookUp(
            ctypes.addressof(kind),
            data,
            stride,
            weight.shape[-1],
            ids.value.data_ptr(),
            out.data_ptr(),
        )
        self._add(operations.look_up, len(out), look_up, out)
        return self._tensor(out)

    def silu_mul(self, gate: GraphTensor, up: GraphTensor) -> GraphTensor:
        """silu(gate) * up, in gate's buffer. Raises: BackendError: different shapes."""
        require(gate.shape == up.shape, "a gated product", gate, up)
        return self._by_row(operations.silu_multiply, gate, up, gate.value)

    def silu(self, x: GraphTensor) -> GraphTensor:
        """silu(x), in x's buffer."""
        return self._by_row(operations.silu, x, x, x.value)

    def multiply(self, x: GraphTensor, y: GraphTensor) -> GraphTensor:
        """x * y, in x's buffer. Raises: BackendError: different shapes."""
        require(x.shape == y.shape, "a product of each value", x, y)
        return self._by_row(operations.multiply, x, y, x.value)

    def add(self, x: GraphTensor, y: GraphTensor, out: torch.Tensor | None = None) -> GraphTensor:
        """x + y for x [..., M] and y [..., M] or [1, M].

        Args:
            out: where the result goes; by default into x's buffer.

        Raises:
            BackendError: other shapes.
        """
        require(y.shape in (x.shape, (1, x.shape[-1])), "a sum", x, y)
        return self._by_row(operations.add, x, y, x.value if out is None else out)

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
            raise BackendError(f"a norm needs a finite epsilon above 0 in float32, found {eps}")
        out = buffer(*x.shape) if out is None else out
        return self._by_row(operations.rms_norm, x, weight, out, eps)

    def spread_nan(self, rows: int, outputs: Sequence[GraphTensor]) -> None:
        """Nothing to do: see `spoiled`."""

    def _by_row(
        self, run: int, x: GraphTensor, y: GraphTensor, out: torch.Tensor, number: float = 0.0
    ) -> GraphTensor:
        """An operation on rows, whose second argument may be one row for all."""
        inputs, others, outputs = _rows(x.value), _rows(y.value), _rows(out)
        data = Rows(
            outputs.data_ptr(),
            inputs.data_ptr(),
            others.data_ptr(),
            len(inputs),
            inputs.shape[1],
            inputs.stride(0),
            others.stride(0) if len(others) == len(inputs) else 0,
            outputs.stride(0),
            number,
        )
        self._referenced += [inputs, others]
        self._add(run, len(inputs), data, out)
        return self._tensor(out)


AnyGraph = Graph | NativeGraph


def _rows(values: torch.Tensor) -> torch.Tensor:
    """[rows, M]; a view."""
    return values.view(-1, values.shape[-1]) if values.ndim != 2 else values
