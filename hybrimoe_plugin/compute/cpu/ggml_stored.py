"""One layer's experts as ggml graphs read them: stored bytes, or repacked where that is faster."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from hybrimoe_plugin.compute.activation import activate
from hybrimoe_plugin.compute.cpu.ggml import Ggml, check_stored
from hybrimoe_plugin.compute.cpu.ggml.tensor import bytes_of_row
from hybrimoe_plugin.compute.cpu.repack import SLOW_TYPES, as_q8_0, faster_as_q8_0, repacked_bytes
from hybrimoe_plugin.core import SILU, Activation
from hybrimoe_plugin.device.memory import free_host_bytes
from hybrimoe_plugin.weights.layer_weights import Biases, LayerWeights, Matrix
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_SHARE_OF_FREE = 0.02
"""A matrix of all experts is repacked only if it takes less than this share of free memory."""


_APART = ("BF16", "F16", "F32")
"""Types whose experts are read where they lie, also where that is in no order.

The kernels of one product and of indexed products agree in them.
"""


_EQUAL = 1.2
"""Ratio of times up to which plain and indexed kernels count as equally fast for one row."""


class ApartExperts(NamedTuple):
    """One projection of experts that do not lie evenly in the file."""

    experts: tuple[QuantizedMatrix, ...]
    """[N, M] each."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, N, M]"""
        return len(self.experts), *self.experts[0].shape

    @property
    def type_name(self) -> str:
        return self.experts[0].type_name


Projection = QuantizedMatrix | ApartExperts
"""One projection of all experts."""


class StoredExperts(NamedTuple):
    """What the graphs of one layer are built from."""

    ggml: Ggml
    threads: int
    gate: Projection
    """[E, I, H]"""
    up: Projection
    """[E, I, H]"""
    down: Projection
    """[E, H, I]"""
    activation: Activation
    biases: Biases | None

    @property
    def indexable(self) -> bool:
        """Whether each projection is one matrix, of a type whose indexed products are right."""
        parts = self.gate, self.up, self.down
        if any(isinstance(part, ApartExperts) for part in parts):
            return False
        return all(self.ggml.forms(part.type_name).indexed for part in parts)

    @property
    def tiled(self) -> bool:
        """Whether plain products of several rows are right in all three types."""
        parts = self.gate, self.up, self.down
        return all(self.ggml.forms(part.type_name).rows for part in parts)

    @property
    def plain(self) -> bool:
        """Whether plain products of any number of rows are right in all three types."""
        parts = self.gate, self.up, self.down
        return self.tiled and all(self.ggml.forms(part.type_name).row for part in parts)

    @property
    def rows_for_plain(self) -> float:
        """Mean rows of an expert from which plain products are used; 0 for always."""
        parts = self.gate, self.up, self.down
        speeds = (self.ggml.kernel_speed(part.type_name, self.threads) for part in parts)
        factor = max(speed.plain_factor for speed in speeds)
        return factor if factor > _EQUAL else 0.0

    @property
    def is_swiglu(self) -> bool:
        """Whether ggml computes all of an expert by itself."""
        return self.activation == SILU and self.biases is None

    def activate(self, gates: torch.Tensor, ups: torch.Tensor, experts: torch.Tensor) -> None:
        """Add biases and apply the activation.

        Args:
            gates: [..., I], one row for each of `experts` [...]. Mutates: the result.
            ups: [..., I].
        """
        if self.biases is not None:
            gate, up = self.biases.gate_up[experts].chunk(2, dim=-1)
            gates += gate
            ups += up
        gates.copy_(activate(gates, ups, self.activation))

    def add_down_bias(self, outputs: torch.Tensor, experts: torch.Tensor) -> None:
        """Add the last biases to outputs [..., H] of `experts` [...]. Mutates: `outputs`."""
        if self.biases is not None:
            outputs += self.biases.down[experts]

    @classmethod
    def of(cls, ggml: Ggml, threads: int, weights: LayerWeights, repack: bool) -> StoredExperts:
        """Check a layer's matrices, repack them where that pays, and measure their types.

        Args:
            repack: whether matrices may be copied into a type with faster kernels.

        Raises:
            BackendError: a type without a kernel.
        """
        spec = weights.spec
        inner = (spec.experts, spec.intermediate, spec.hidden)
        outer = (spec.experts, spec.hidden, spec.intermediate)
        matrices: list[Projection] = []
        for matrix, shape in zip(weights.matrices(), (inner, inner, outer), strict=True):
            ggml.require(matrix.type_name)
            if is_apart(matrix):
                matrices.append(_apart(matrix, shape[1:]))
                ggml.kernel_speed(matrix.type_name, threads)
                continue
            stored = _stack(matrix, shape)
            check_stored(stored)
            if repack and not stored.stride and _repacking_pays(ggml, threads, stored):
                stored = as_q8_0(stored)
            # Measured now: otherwise the first answer waits for it.
            ggml.kernel_speed(stored.type_name, threads)
            matrices.append(stored)
        gate, up, down = matrices
        return cls(ggml, threads, gate, up, down, spec.activation, weights.biases)


def expert_matrix(stored: Projection, expert: int) -> QuantizedMatrix:
    """One expert's matrix [N, M] of all experts' [E, N, M]; not copied."""
    if isinstance(stored, ApartExperts):
        return stored.experts[expert]
    _, rows, columns = stored.shape
    size = rows * bytes_of_row(stored.type_name, columns)
    start = expert * (stored.stride or size)
    data = stored.data[start : start + size]
    return QuantizedMatrix(data, stored.type_name, stored.shape[1:])


def is_apart(matrix: Matrix) -> bool:
    """Whether experts do not lie evenly in the file, and graphs read them there."""
    even = matrix.stacked is not None or matrix.spread is not None
    return not even and matrix.type_name in _APART


def _apart(matrix: Matrix, shape: tuple[int, ...]) -> ApartExperts:
    """Views of experts' matrices. Raises: BackendError: bytes that do not fit the shape."""
    found = tuple(QuantizedMatrix(data, matrix.type_name, shape) for data in matrix.experts)
    for stored in found:
        check_stored(stored)
    return ApartExperts(found)


def _repacking_pays(ggml: Ggml, threads: int, stored: QuantizedMatrix) -> bool:
    if stored.type_name not in SLOW_TYPES:
        return False
    if repacked_bytes(stored.shape) >= _SHARE_OF_FREE * free_host_bytes():
        return False
    return faster_as_q8_0(ggml, threads, stored.type_name)


def _stack(matrix: Matrix, shape: tuple[int, int, int]) -> QuantizedMatrix:
    """All experts as one stack; those that do not lie evenly in the file are copied."""
    if matrix.spread is not None:
        return QuantizedMatrix(matrix.spread, matrix.type_name, shape, matrix.stride)
    stacked = matrix.stacked
    if stacked is None:
        stacked = np.concatenate(matrix.experts)
    return QuantizedMatrix(stacked.reshape(-1), matrix.type_name, shape)
