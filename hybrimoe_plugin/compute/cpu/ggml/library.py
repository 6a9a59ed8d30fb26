"""The ggml library with what its graphs share: the team of threads and measured speeds."""

from __future__ import annotations

import numpy as np

from hybrimoe_plugin.compute.cpu.ggml.binding import GgmlBinding
from hybrimoe_plugin.compute.cpu.ggml.graph import Graph
from hybrimoe_plugin.compute.cpu.ggml.kernel_speed import KernelSpeed, compare, measured_matrix
from hybrimoe_plugin.compute.cpu.ggml.thread_team import ThreadTeam
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_SPEEDS: dict[tuple[str, int], KernelSpeed] = {}
"""By type and number of threads, as measured in this process: the machine does not change."""


class Ggml:
    """ggml on this machine. Making one loads kt-kernel and tries a product.

    Graphs that belong to one model share one of these, and so one team.

    Raises:
        BackendError: kt-kernel is missing, of a release that was not checked, exports no ggml, or
            computes wrongly.
    """

    def __init__(self) -> None:
        self.binding = GgmlBinding()
        self.team = ThreadTeam()
        self._check_product()

    def kernel_speed(self, type_name: str, threads: int) -> KernelSpeed:
        """The speed of one row's products in a type; measured once in a process, in some 100 ms."""
        key = type_name, threads
        if key not in _SPEEDS:
            _SPEEDS[key] = self._measure(type_name, threads)
        return _SPEEDS[key]

    def _measure(self, type_name: str, threads: int) -> KernelSpeed:
        stored = measured_matrix(type_name)
        rows, columns = stored.shape
        plain, indexed = (self._product(stored, threads, indexed) for indexed in (False, True))
        return compare(plain.run, indexed.run, rows * columns)

    def _product(self, stored: QuantizedMatrix, threads: int, indexed: bool) -> Graph:
        """A graph that multiplies a row of ones by a matrix."""
        graph = Graph(self, threads)
        x = graph.input(1, stored.shape[1])
        product = graph.matmul(graph.weight(stored), x, indexed=indexed)
        graph.finish(product)
        x.value.fill_(1.0)
        return graph

    def _check_product(self) -> None:
        """One small product, so that a surprise shows here and not in a model."""
        values = np.arange(64, dtype=np.float32)
        stored = QuantizedMatrix(values.view(np.uint8), "F32", (2, 32))
        graph = Graph(self, 1)
        x = graph.input(1, 32)
        y = graph.matmul(graph.weight(stored), x, indexed=False)
        graph.finish(y)
        x.value.fill_(1.0)
        graph.run()
        found = y.value.tolist()
        if found != [[float(values[:32].sum()), float(values[32:].sum())]]:
            raise BackendError(f"ggml in kt-kernel computes wrongly: {found}")
