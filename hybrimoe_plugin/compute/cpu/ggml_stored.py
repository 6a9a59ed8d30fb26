"""One layer's experts as ggml graphs read them: stored bytes, or repacked where that is faster."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.ggml import Ggml, check_stored
from hybrimoe_plugin.compute.cpu.repack import SLOW_TYPES, as_q8_0, faster_as_q8_0, repacked_bytes
from hybrimoe_plugin.device.memory import free_host_bytes
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_SHARE_OF_FREE = 0.02
"""A matrix of all experts is repacked only if it takes less than this share of free memory."""


class StoredExperts(NamedTuple):
    """What the graphs of one layer are built from."""

    ggml: Ggml
    threads: int
    gate: QuantizedMatrix
    """[E, I, H]"""
    up: QuantizedMatrix
    """[E, I, H]"""
    down: QuantizedMatrix
    """[E, H, I]"""

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
        matrices = []
        for matrix, shape in zip(weights.matrices(), (inner, inner, outer), strict=True):
            stored = QuantizedMatrix(_stacked(matrix), matrix.type_name, shape)
            check_stored(stored)
            if repack and _repacking_pays(ggml, threads, stored):
                stored = as_q8_0(stored)
            # Measured now: otherwise the first answer waits for it.
            ggml.kernel_speed(stored.type_name, threads)
            matrices.append(stored)
        gate, up, down = matrices
        return cls(ggml, threads, gate, up, down)


def expert_matrix(stored: QuantizedMatrix, expert: int) -> QuantizedMatrix:
    """One expert's matrix [N, M] of all experts' [E, N, M]; not copied."""
    size = stored.nbytes // stored.shape[0]
    start = expert * size
    data = stored.data[start : start + size]
    return QuantizedMatrix(data, stored.type_name, stored.shape[1:])


def _repacking_pays(ggml: Ggml, threads: int, stored: QuantizedMatrix) -> bool:
    if stored.type_name not in SLOW_TYPES:
        return False
    if repacked_bytes(stored.shape) >= _SHARE_OF_FREE * free_host_bytes():
        return False
    return faster_as_q8_0(ggml, threads, stored.type_name)


def _stacked(matrix: Matrix) -> NDArray[np.uint8]:
    """All experts' bytes at one address; experts that are kept apart in the file are copied."""
    stacked = matrix.stacked
    if stacked is None:
        stacked = np.concatenate(matrix.experts)
    return stacked.reshape(-1)
