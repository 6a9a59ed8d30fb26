"""Linears on matrices as the GGUF file stores them.

There is no dequantised copy, and a product reads about a quarter of bfloat16's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hybrimoe_plugin.compute.cpu.ggml import Ggml, GraphTensor, check_stored
from hybrimoe_plugin.compute.cpu.ggml_function import GgmlFunction
from hybrimoe_plugin.compute.cpu.native.choice import kernels_of
from hybrimoe_plugin.compute.cpu.native.graph import AnyGraph
from hybrimoe_plugin.errors import BackendError, InputError
from hybrimoe_plugin.injection.moved import old_names
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.operators.device_linear import DeviceLinear
from hybrimoe_plugin.weights.gguf_store import dequantize_bytes
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

__getattr__ = old_names(__name__)


class GgmlLinear(nn.Module):
    """`nn.Linear` whose matrix is given as stored bytes, by `take`, instead of as a parameter."""

    def __init__(self, ggml: Ggml, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.ggml = ggml
        self.stored: QuantizedMatrix | None = None
        self._function = GgmlFunction(
            ggml, lambda graph, x: [self.build(graph, x)], learned=lambda: (self.bias,)
        )

    def take(self, stored: QuantizedMatrix) -> None:
        """Use this matrix [out, in].

        Raises:
            BackendError: a type without a kernel, or another shape.
        """
        shape = self.out_features, self.in_features
        if stored.shape != shape:
            raise BackendError(f"expected a matrix {shape}, found {stored.shape}")
        self.ggml.require(stored.type_name)
        check_stored(stored)
        if kernels_of(self.ggml) is None:
            # Measured here, else the first answer waits for it. The operations need no measurement.
            self.ggml.kernel_speed(stored.type_name, torch.get_num_threads())
        self.stored = stored

    def dequantised(self) -> torch.Tensor:
        """[out, in] float32, fresh. Raises: BackendError: there is no matrix yet."""
        stored = self._matrix()
        return dequantize_bytes(stored.data, stored.type_name, stored.shape)

    def build(self, graph: AnyGraph, x: GraphTensor) -> GraphTensor:
        """[..., N] from [..., M] in a graph. Raises: BackendError: there is no matrix yet."""
        y = graph.matmul(graph.weight(self._matrix()), x)
        if self.bias is None:
            return y
        return graph.add(y, graph.constant(self.bias))

    def _matrix(self) -> QuantizedMatrix:
        if self.stored is None:
            raise BackendError("a stored linear was not given its matrix")
        return self.stored

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] of x's dtype from [..., M].

        Raises:
            InputError: another width, or no floating point values.
        """
        if x.shape[-1:] != (self.in_features,):
            raise InputError(
                f"a linear of {self.in_features} inputs was given values {list(x.shape)}"
            )
        flat = x.reshape(-1, self.in_features)
        (y,) = self._function(flat, len(flat))
        # A copy in every case: the buffer belongs to the graph.
        return y.to(x.dtype, copy=True).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        kind = self.stored.type_name if self.stored is not None else "not loaded"
        return f"in_features={self.in_features}, out_features={self.out_features}, matrix={kind}"


def keep_quantized(operator: DenseOperator, name: str, linear: nn.Module) -> nn.Module:
    """The operator's linear on the matrix as stored, on the CPU or on its device.

    It is returned as it is where the operator's settings ask for plain linears.

    Args:
        name: of the linear in the operator.
    """
    if not isinstance(linear, nn.Linear):
        return linear
    if operator.ggml is not None:
        return GgmlLinear(operator.ggml, linear)
    if operator.on_device:
        return DeviceLinear(f"{operator.key}.{name}", None, None, linear, dense="dequantised")
    return linear


class LinearGroup:
    """Linears that share their input, computed by one graph where all of them are `GgmlLinear`.

    Args:
        owner: the module that holds them. They are looked up at every call, since adapters put
            others in their place.
        names: of the linears in it, `nn.Linear` or `GgmlLinear`, of one input width.
    """

    def __init__(self, ggml: Ggml | None, owner: nn.Module, names: Sequence[str]) -> None:
        self._owner = owner
        self._names = tuple(names)
        self._function: GgmlFunction | None = None
        if ggml is not None:
            self._function = GgmlFunction(ggml, self.build, learned=self._biases)

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One output [N, M_i] for each linear from x [N, M], float32 or of x's dtype.

        Valid until the next call.
        """
        if self._function is None:
            return [linear(x) for linear in self._linears()]
        return self._function(x, len(x))

    def build(self, graph: AnyGraph, x: GraphTensor) -> list[GraphTensor]:
        """The outputs in a graph, from [N, M]; every linear must be a `GgmlLinear`."""
        return [linear.build(graph, x) for linear in self._linears()]

    def _linears(self) -> list[Any]:
        return [getattr(self._owner, name) for name in self._names]

    def _biases(self) -> list[torch.Tensor | None]:
        return [linear.bias for linear in self._linears()]


class QuantizedLinear(DenseOperator):
    """A dense linear on the matrix as stored, such as the language model's head.

    A plain linear where the settings ask for it.
    """

    plain_class = nn.Linear
    bias: nn.Parameter | None

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **kwargs)
        self.in_features = orig_module.in_features
        self.out_features = orig_module.out_features
        linear = keep_quantized(self, "stored", orig_module)
        self.stored: Any = None
        if linear is orig_module:
            # `register_parameter` refuses the name of a property.
            self._parameters["weight"] = orig_module.weight  # type: ignore[assignment]
        else:
            self.stored = linear
            # Its bias is here, under the name that it has in the model.
            self.stored.bias = None
        self.register_parameter("bias", orig_module.bias)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]; dequantised for this call where the matrix stays as stored.

        Some models multiply by the weights of a linear without calling it.
        """
        if self.stored is None:
            plain: torch.Tensor = self._parameters["weight"]  # type: ignore[assignment]
            return plain
        dequantised: torch.Tensor = self.stored.dequantised()
        return dequantised

    def take(self, stored: QuantizedMatrix) -> None:
        """Use this matrix [out, in].

        Raises:
            BackendError: a type without a kernel, or another shape.
        """
        assert self.stored is not None
        self.stored.take(stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] from [..., M]."""
        if self.stored is not None:
            quantized: torch.Tensor = self.stored(x)
            return quantized if self.bias is None else quantized + self.bias.to(quantized.dtype)
        return F.linear(x, self.weight, self.bias)
