"""The tensors of a ggml graph: where their structures lie, and the memory that they read."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.ggml.binding import F32, I32
from hybrimoe_plugin.compute.cpu.ggml.runtime import GraphRuntime
from hybrimoe_plugin.compute.cpu.ggml.tensor import (
    GraphTensor,
    buffer,
    bytes_of_row,
    check_stored,
)
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix


class GraphTensors:
    """Makes tensors of a graph that is being built, and keeps what they read alive.

    Args:
        most: tensors that it may have, inputs and weights included.
    """

    def __init__(self, ggml: GraphRuntime, most: int) -> None:
        self._ggml = ggml
        self._binding = ggml.binding
        self._most_tensors = most
        self._tensors = 0
        self._memory = np.empty(self._binding.context_bytes(most), np.uint8)
        self._context = self._binding.new_context(self._memory)
        if not self._context:
            raise BackendError(
                "ggml has no context left: more than 64 graphs are being built at once"
            )
        self._referenced: list[Any] = []
        """Memory that ggml holds addresses of."""

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

    @property
    def data_at(self) -> int:
        """Word of a tensor's structure that holds its address."""
        return self._binding.data_offset // 8

    @property
    def sizes_at(self) -> int:
        """First of the four words with its sizes, innermost first; four strides follow."""
        return self._binding.sizes_offset // 8

    def structures(
        self, tensors: Sequence[GraphTensor]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(the graph's structures as words, the first word of each tensor's)."""
        offsets = [tensor.pointer - self._memory.ctypes.data for tensor in tensors]
        assert not any(offset % 8 for offset in offsets)
        words = self._memory[: len(self._memory) // 8 * 8].view(np.int64)
        return words, np.array(offsets, np.int64) // 8

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
