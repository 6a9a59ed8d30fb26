"""Linears on matrices as the GGUF file stores them: no dequantised copy, and a quarter of the bytes
to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrimoe_plugin.compute.cpu.ggml import Ggml, Graph, GraphTensor, check_stored
from hybrimoe_plugin.errors import BackendError, InputError
from hybrimoe_plugin.injection.moved import old_names
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.operators.device_linear import DeviceLinear
from hybrimoe_plugin.operators.gradients import outside_autograd
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

__getattr__ = old_names(__name__)

Build = Callable[[Graph, GraphTensor], Sequence[GraphTensor]]


class RowGraphs:
    """Graphs of one function for different numbers of rows; the one for a single row is kept.

    Args:
        build: adds the operations to a graph with the given input and gives the outputs.
        threads: by default those of torch, whose OpenMP pool it is; 1 for what is too small to be
            shared.
        row: [1, M] float32, the input of graphs for a single row; by default memory of each graph's
            own.
        ids: the input is integers, else floating point.
        learned: gives the parameters that the graphs hold as constants, for which there are no
            gradients.
    """

    def __init__(
        self,
        ggml: Ggml,
        build: Build,
        threads: int | None = None,
        row: torch.Tensor | None = None,
        ids: bool = False,
        learned: Callable[[], Sequence[torch.Tensor | None]] = tuple,
    ) -> None:
        self._ggml = ggml
        self._build = build
        self._threads = threads
        self._row = row
        self._ids = ids
        self._learned = learned
        self._one: dict[int, tuple[Graph, GraphTensor, Sequence[GraphTensor]]] = {}
        """For each number of threads: torch has one for every thread that calls it."""

    def __call__(self, x: torch.Tensor, rows: int) -> list[torch.Tensor]:
        """Float32 outputs for x, whose shape depends on the number of rows alone. Valid until the
        next call.

        Rows whose products met a NaN or an infinity are NaN. Going backward through them raises
        BackendError.

        Raises:
            InputError: x is of another shape or type than this function takes.
        """
        if x.is_floating_point() is self._ids:
            raise InputError(
                f"expected {'whole numbers' if self._ids else 'floating point values'}, found "
                f"{x.dtype}"
            )
        if torch.is_grad_enabled():
            return outside_autograd(
                "a matrix as stored", lambda: self(x, rows), x, *self._learned()
            )
        threads = self._threads or torch.get_num_threads()
        made = self._one.get(threads) if rows == 1 else None
        if made is None:
            made = self._made(x, threads, kept=rows == 1)
            if rows == 1:
                self._one[threads] = made
        graph, node, outputs = made
        if x.shape != node.shape:
            raise InputError(f"expected values {list(node.shape)}, found {list(x.shape)}")
        node.fill(x)
        graph.run()
        if graph.spoiled:
            graph.spread_nan(rows, outputs)
        return [output.value for output in outputs]

    def _made(
        self, x: torch.Tensor, threads: int, kept: bool
    ) -> tuple[Graph, GraphTensor, Sequence[GraphTensor]]:
        graph = Graph(self._ggml, threads, kept=kept)
        if kept and self._row is not None:
            node = graph.wrap(self._row)
        else:
            node = graph.input(*x.shape, dtype=torch.int32 if self._ids else torch.float32)
        outputs = self._build(graph, node)
        graph.finish(*outputs)
        return graph, node, outputs


class GgmlLinear(nn.Module):
    """`nn.Linear` whose matrix is given as stored bytes, by `take`, instead of as a parameter."""

    def __init__(self, ggml: Ggml, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.ggml = ggml
        self.stored: QuantizedMatrix | None = None
        self._graphs: RowGraphs | None = None

    def take(self, stored: QuantizedMatrix) -> None:
        """Raises: BackendError: a type without a kernel, or another shape."""
        if stored.shape != (self.out_features, self.in_features):
            raise BackendError(
                f"expected a matrix {(self.out_features, self.in_features)}, found {stored.shape}"
            )
        check_stored(stored)
        self.ggml.kernel_speed(
            stored.type_name, torch.get_num_threads()
        )  # else the first answer waits for it
        self.stored = stored

    def build(self, graph: Graph, x: GraphTensor) -> GraphTensor:
        """[..., N] from [..., M] in a graph. Raises: BackendError: there is no matrix yet."""
        if self.stored is None:
            raise BackendError("a stored linear was not given its matrix")
        y = graph.matmul(graph.weight(self.stored), x)
        return y if self.bias is None else graph.add(y, graph.constant(self.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] of x's dtype from [..., M]. Raises: InputError: another width, or no floating
        point.
        """
        if x.shape[-1:] != (self.in_features,):
            raise InputError(
                f"a linear of {self.in_features} inputs was given values {list(x.shape)}"
            )
        if self._graphs is None:
            self._graphs = RowGraphs(
                self.ggml, lambda graph, x: [self.build(graph, x)], learned=lambda: (self.bias,)
            )
        flat = x.reshape(-1, self.in_features)
        (y,) = self._graphs(flat, len(flat))
        # A copy in every case: the buffer belongs to the graph.
        return y.to(x.dtype, copy=True).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        kind = self.stored.type_name if self.stored is not None else "not loaded"
        return f"in_features={self.in_features}, out_features={self.out_features}, matrix={kind}"


def as_stored(operator: DenseOperator, name: str, linear: nn.Module) -> nn.Module:
    """The operator's linear on stored bytes, on the CPU or on its device; itself where it is to be
    plain.

    Args:
        name: of the linear in the operator.
    """
    if not isinstance(linear, nn.Linear):
        return linear
    if operator.ggml is not None:
        return GgmlLinear(operator.ggml, linear)
    if operator.on_device:
        return DeviceLinear(f"{operator.key}.{name}", None, None, linear, linears="plain")
    return linear


class LinearGroup:
    """Linears that share their input, as one graph where all are stored.

    Args:
        owner: the module that holds them. They are looked up at every call: adapters put others in
            their place.
        names: of the linears in it, `nn.Linear` or `GgmlLinear`, of one input width.
    """

    def __init__(self, ggml: Ggml | None, owner: nn.Module, names: Sequence[str]) -> None:
        self._owner = owner
        self._names = tuple(names)
        self._graphs = None if ggml is None else RowGraphs(ggml, self._build, learned=self._biases)

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One output [N, M_i] per linear for x [N, M], float32 or x's dtype. Valid until the next
        call.
        """
        if self._graphs is None:
            return [linear(x) for linear in self._linears()]
        return self._graphs(x, len(x))

    def _build(self, graph: Graph, x: GraphTensor) -> list[GraphTensor]:
        return [linear.build(graph, x) for linear in self._linears()]

    def _linears(self) -> list[Any]:
        return [getattr(self._owner, name) for name in self._names]

    def _biases(self) -> list[torch.Tensor | None]:
        return [linear.bias for linear in self._linears()]


class QuantizedLinear(DenseOperator):
    """A dense linear, the language model's head above all, on the matrix as stored; plain where
    that is not asked.
    """

    def __init__(
        self, key: str, gguf_loader: Any, config: Any, orig_module: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **kwargs)
        self.in_features, self.out_features = orig_module.in_features, orig_module.out_features
        made = as_stored(self, "stored", orig_module)
        self.stored: Any = made if made is not orig_module else None
        if self.stored is None:
            self.weight = orig_module.weight
        self.bias = orig_module.bias

    def take(self, stored: QuantizedMatrix) -> None:
        """Raises: BackendError: a type without a kernel, or another shape."""
        assert self.stored is not None
        self.stored.take(stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] from [..., M]."""
        y: torch.Tensor = (
            F.linear(x, self.weight, self.bias) if self.stored is None else self.stored(x)
        )
        return y
