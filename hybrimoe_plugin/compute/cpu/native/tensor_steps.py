"""The tensors of a graph of operations."""

from __future__ import annotations

import torch

from hybrimoe_plugin.compute.cpu.ggml.runtime import GraphRuntime
from hybrimoe_plugin.compute.cpu.ggml.tensor import GraphTensor, buffer, check_stored
from hybrimoe_plugin.compute.cpu.native.kernels import Kernels
from hybrimoe_plugin.compute.cpu.native.product_steps import ProductSteps
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix


class TensorSteps(ProductSteps):
    """Steps, and the tensors that they read and write."""

    def __init__(self, ggml: GraphRuntime, kernels: Kernels, threads: int) -> None:
        super().__init__(kernels, threads)
        self._ggml = ggml

    def input(self, *shape: int, dtype: torch.dtype = torch.float32) -> GraphTensor:
        """A buffer that the caller fills: float32, or int32 for ids."""
        return self._tensor(buffer(*shape, dtype=dtype))

    def weight(self, stored: QuantizedMatrix) -> GraphTensor:
        """Stored bytes, read in place.

        Raises:
            BackendError: a type that was not tried, or bytes that do not fit the shape.
        """
        check_stored(stored)
        self._referenced.append(stored)
        return GraphTensor(0, stored.shape, None, stored.type_name, stored)

    def wrap(self, memory: torch.Tensor) -> GraphTensor:
        """A tensor in the caller's memory, float32 and contiguous."""
        assert memory.dtype == torch.float32
        assert memory.is_contiguous() and memory.device.type == "cpu"
        return self._tensor(memory)

    def wrap_ids(self, memory: torch.Tensor) -> GraphTensor:
        """The same for ids int32."""
        return self._tensor(memory)

    def constant(self, values: torch.Tensor) -> GraphTensor:
        """One of the model's own vectors [M] as [1, M] float32; not copied if it is float32."""
        return self.wrap(values.detach().float()[None])

    def view(self, tensor: GraphTensor, part: torch.Tensor) -> GraphTensor:
        """A part of a tensor's buffer, given as torch's view of it; the last dimension dense."""
        assert part.stride(-1) == 1 and part.dtype == torch.float32
        return self._tensor(part)

    def _tensor(self, memory: torch.Tensor) -> GraphTensor:
        self._referenced.append(memory)
        return GraphTensor(0, tuple(memory.shape), memory)
