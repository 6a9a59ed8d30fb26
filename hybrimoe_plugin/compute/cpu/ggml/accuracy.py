"""Find out which of ggml's kernels for a type give the right values on this machine.

The same type takes other kernels with one row, with several and with indices, and other ones on
other processors. Not all are right: with kt-kernel 0.7.2 on an AMD EPYC the tiles for IQ2_XXS give
values that have nothing to do with the product, and those for IQ4_XS overflow 16 bits, which costs
4 % of a product of ordinary activations. Indexed products of both are right (docs/LOG.md).

Activations here are whole numbers up to 127, with a 127 in every block. Rounding to 8 bits changes
none of them, so a right kernel is exact but for float32 sums. They are as large as activations in
8 bits can be, so sums that may overflow do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.ggml.binding import GgmlBinding
from hybrimoe_plugin.compute.cpu.ggml.graph import Graph
from hybrimoe_plugin.compute.cpu.ggml.kernel_speed import KernelSpeed
from hybrimoe_plugin.compute.cpu.ggml.random_matrix import random_matrix
from hybrimoe_plugin.compute.cpu.ggml.runtime import Forms
from hybrimoe_plugin.compute.cpu.ggml.tensor import GraphTensor
from hybrimoe_plugin.compute.cpu.ggml.thread_team import ThreadTeam
from hybrimoe_plugin.weights.gguf_store import dequantize_bytes
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

LIMIT = 0.01
"""Relative error from which a kernel counts as wrong.

Kernels that round activations to 8 bits in another way than expected may lose 0.7 %, which is the
error of such rounding; the wrong ones that are known lose 15 % and more.
"""

_COUNTS = (2, 3, 4, 5, 6, 7, 8, 19)
"""Numbers of rows: tiles have a kernel for each up to 8, and combine them for more."""
_EXPERTS, _OUTPUTS, _COLUMNS = 2, 67, 512
"""An odd number of outputs, for what tiles leave over; two blocks of 256 values in a row."""
_ROUNDED_TOGETHER = 32
_LARGEST = 127


def tried_forms(binding: GgmlBinding, type_name: str) -> Forms:
    """Try every form with small products of random blocks, in some milliseconds.

    Args:
        type_name: must be one of `TYPES`: others end the process.
    """
    return _Trial(binding, type_name).forms()


class _Unchecked(NamedTuple):
    """Lets graphs use forms of which nothing is known yet."""

    binding: GgmlBinding
    team: ThreadTeam

    def forms(self, type_name: str) -> Forms:
        return Forms(True, True, True, True)

    def kernel_speed(self, type_name: str, threads: int) -> KernelSpeed:
        raise AssertionError("a trial says itself which form it tries")


class _Trial:
    """A stack of random matrices in one type, and what their products must be.

    Those are computed once, on one thread: beside a busy process a team would wait for its time
    slices at every small product.
    """

    def __init__(self, binding: GgmlBinding, type_name: str) -> None:
        self._ggml = _Unchecked(binding, ThreadTeam())
        shape = _EXPERTS, _OUTPUTS, _COLUMNS
        self._stack = random_matrix(type_name, shape)
        first = self._stack.data[: self._stack.nbytes // _EXPERTS]
        self._matrix = QuantizedMatrix(first, type_name, shape[1:])
        self._x = _activations()
        self._values = dequantize_bytes(self._stack.data, type_name, shape).numpy()
        wide = self._values.astype(np.float64)
        self._products = np.einsum("tm,enm->ten", self._x.numpy().astype(np.float64), wide)
        """[largest count, _EXPERTS, _OUTPUTS] float64"""

    def forms(self) -> Forms:
        return Forms(
            row=self._plain(1),
            rows=all(self._plain(count) for count in _COUNTS),
            indexed=all(self._indexed(count) for count in (1, *_COUNTS)),
            lookup=self._lookup(),
        )

    def _plain(self, count: int) -> bool:
        graph = Graph(self._ggml, 1)
        x = graph.wrap(self._x[:count])
        y = graph.matmul(graph.weight(self._matrix), x, indexed=False)
        return _gives(graph, y, self._products[:count, 0])

    def _indexed(self, count: int) -> bool:
        """Each row by all matrices, in another order for every other row."""
        order = np.tile(np.arange(_EXPERTS, dtype=np.int32), (count, 1))
        order[1::2] = order[1::2, ::-1]
        graph = Graph(self._ggml, 1)
        x = graph.wrap(self._x[:count, None])
        ids = graph.wrap_ids(torch.from_numpy(order))
        y = graph.matmul_id(graph.weight(self._stack), x, ids)
        return _gives(graph, y, self._products[np.arange(count)[:, None], order])

    def _lookup(self) -> bool:
        order = np.arange(_OUTPUTS, dtype=np.int32)[::-1].copy()
        graph = Graph(self._ggml, 1)
        y = graph.rows(graph.weight(self._matrix), graph.wrap_ids(torch.from_numpy(order)))
        return _gives(graph, y, self._values[0, order])


def _activations() -> torch.Tensor:
    """[largest count, _COLUMNS] float32 that rounding to 8 bits does not change."""
    rng = np.random.default_rng(0)
    shape = _COUNTS[-1], _COLUMNS // _ROUNDED_TOGETHER, _ROUNDED_TOGETHER
    values = rng.integers(-_LARGEST, _LARGEST + 1, shape).astype(np.float32)
    values[..., 0] = _LARGEST
    return torch.from_numpy(values.reshape(-1, _COLUMNS))


def _gives(graph: Graph, y: GraphTensor, wanted: NDArray[Any]) -> bool:
    """Whether a graph's only output is within `LIMIT` of these values; NaN is not."""
    graph.finish(y)
    graph.run()
    with np.errstate(all="ignore"):  # what a wrong kernel gives need not be a number
        difference = y.value.numpy() - wanted
        error = np.linalg.norm(difference) / np.linalg.norm(wanted)
    return bool(error < LIMIT)
