"""The ggml library with what its graphs share: the team of threads, and what was found out about
its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hybrimoe_plugin.compute.cpu.ggml.accuracy import tried_forms
from hybrimoe_plugin.compute.cpu.ggml.binding import GgmlBinding
from hybrimoe_plugin.compute.cpu.ggml.graph import Graph
from hybrimoe_plugin.compute.cpu.ggml.kernel_speed import KernelSpeed, fastest, measured_matrix
from hybrimoe_plugin.compute.cpu.ggml.runtime import Forms
from hybrimoe_plugin.compute.cpu.ggml.tensor import TYPES
from hybrimoe_plugin.compute.cpu.ggml.thread_team import ThreadTeam
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_Made = TypeVar("_Made")

_SPEEDS: dict[tuple[str, int], KernelSpeed] = {}
"""By type and number of threads, as measured in this process: the machine does not change."""

_FORMS: dict[str, Forms] = {}
"""By type, as tried in this process."""


class Ggml:
    """ggml on this machine. Making one loads kt-kernel and tries products in F32.

    Graphs that belong to one model share one of these, and so one team.

    Args:
        operations: compiled operations may take the place of ggml's graphs.

    Raises:
        BackendError: kt-kernel is missing, of a release that was not checked, exports no ggml, or
            computes wrongly.
    """

    def __init__(self, operations: bool = True) -> None:
        self.binding = GgmlBinding()
        self.operations = operations
        self._companions: dict[Any, Any] = {}
        self.team = ThreadTeam()
        if not self.computes("F32"):
            raise BackendError("ggml in kt-kernel computes wrongly, even in F32")

    def companion(self, made_with: Callable[[GgmlBinding], _Made]) -> _Made:
        """What a class makes of this library, made once."""
        found: _Made | None = self._companions.get(made_with)
        if found is None:
            found = self._companions[made_with] = made_with(self.binding)
        return found

    def forms(self, type_name: str) -> Forms:
        """Which kernels for a type are right; tried once in a process, in some 10 ms.

        None is for a type that ggml must not see.
        """
        if type_name not in TYPES:
            return Forms(False, False, False, False)
        if type_name not in _FORMS:
            _FORMS[type_name] = tried_forms(self.binding, type_name)
        return _FORMS[type_name]

    def computes(self, type_name: str) -> bool:
        """Whether matrices of a type can be used as they are stored, on this machine."""
        return self.forms(type_name).complete

    def require(self, type_name: str) -> None:
        """Raises: BackendError: matrices of this type cannot be used as they are stored."""
        if not self.computes(type_name):
            raise BackendError(
                f"no ggml kernel for type {type_name} that gives right values on this machine"
            )

    def kernel_speed(self, type_name: str, threads: int) -> KernelSpeed:
        """The speed of one row's products in a type; measured once in a process, in some 100 ms.

        Raises:
            BackendError: a type without a kernel that is right.
        """
        key = type_name, threads
        if key not in _SPEEDS:
            _SPEEDS[key] = self._measure(type_name, threads)
        return _SPEEDS[key]

    def _measure(self, type_name: str, threads: int) -> KernelSpeed:
        self.require(type_name)
        forms = self.forms(type_name)
        right = [indexed for indexed in (False, True) if (forms.row, forms.indexed)[indexed]]
        stored = measured_matrix(type_name)
        rows, columns = stored.shape
        products = {indexed: self._product(stored, threads, indexed).run for indexed in right}
        return fastest(products, rows * columns)

    def _product(self, stored: QuantizedMatrix, threads: int, indexed: bool) -> Graph:
        """A graph that multiplies a row of ones by a matrix."""
        graph = Graph(self, threads)
        x = graph.input(1, stored.shape[1])
        product = graph.matmul(graph.weight(stored), x, indexed=indexed)
        graph.finish(product)
        x.value.fill_(1.0)
        return graph
