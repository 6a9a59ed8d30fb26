"""Tensors of a ggml graph, and what must hold of them before ggml may see them."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

FLOATS = frozenset({"F32", "F16", "BF16"})
"""Types whose products keep NaN and infinity."""

_QUANTISED = frozenset(
    {
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
        "IQ3_S",
        "IQ3_XXS",
        "IQ2_S",
        "IQ2_XS",
        "IQ2_XXS",
        "IQ1_M",
        "IQ1_S",
    }
)

TYPES = FLOATS | _QUANTISED
"""GGML types that ggml may see: others end the process.

Each was tried against a float32 reference (tests/compute/ggml). Which kernels are right for a type
differs by processor: `Ggml.forms` says that.
"""


class GraphTensor(NamedTuple):
    """A tensor of a graph."""

    pointer: int
    shape: tuple[int, ...]
    """In torch's order of dimensions."""
    data: torch.Tensor | None
    """Its memory; None for stored weights."""
    type_name: str = "F32"
    stored: QuantizedMatrix | None = None
    """Stored weights, where the graph must know them."""

    @property
    def value(self) -> torch.Tensor:
        """Its memory, for tensors that are no stored weights."""
        assert self.data is not None, "stored weights have no torch tensor"
        return self.data

    def fill(self, values: torch.Tensor) -> None:
        """Write values of this shape.

        No gradient flows through a graph, and none may keep a reference to its buffers.
        """
        self.value.copy_(values.detach())


def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """CPU memory that calls of every mode may write to.

    What inference mode makes can be changed only there. And the default device does not count:
    operators are built while that is `meta`.
    """
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device="cpu")


def require(fits: bool, what: str, *tensors: GraphTensor) -> None:
    """Raise BackendError unless the shapes of an operation's tensors fit together."""
    if not fits:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors)
        raise BackendError(
            f"ggml cannot compute {what} of {shapes}: the shapes do not fit together"
        )


def require_form(right: bool, what: str, weight: GraphTensor) -> None:
    """Raise BackendError unless a kernel for the weight's type gives right values here."""
    if not right:
        raise BackendError(f"ggml's {what} in {weight.type_name} are wrong on this machine")


def check_stored(stored: QuantizedMatrix) -> None:
    """Check that ggml may read a matrix.

    Raises:
        BackendError: a type that was not tried, or bytes that do not fit the shape.
    """
    name = stored.type_name
    if name not in TYPES:
        known = ", ".join(sorted(TYPES))
        raise BackendError(f"no ggml kernel for type {name}; there is for {known}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    columns = stored.shape[-1]
    if columns % block:
        raise BackendError(f"{name}: a row of {columns} values is not a multiple of {block}")
    wanted = int(np.prod(stored.shape)) // block * block_bytes
    if stored.stride:
        wanted = _strided_bytes(stored, bytes_of_row(name, columns))
    if stored.data.size != wanted or not stored.data.flags.c_contiguous:
        raise BackendError(
            f"a matrix {stored.shape} in {name} needs {wanted} contiguous bytes, found "
            f"{stored.data.size}"
        )


def _strided_bytes(stored: QuantizedMatrix, row_bytes: int) -> int:
    """Bytes from the first matrix of a stack to the end of the last one.

    Raises:
        BackendError: matrices that overlap, or do not begin at whole rows.
    """
    experts, rows, _ = stored.shape
    if stored.stride % row_bytes or stored.stride < rows * row_bytes:
        raise BackendError(
            f"matrices of {rows} rows of {row_bytes} bytes cannot be {stored.stride} bytes apart"
        )
    return (experts - 1) * stored.stride + rows * row_bytes


def bytes_of_row(type_name: str, columns: int) -> int:
    """Stored bytes of one row of a matrix."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return columns // block * block_bytes


def norm_epsilon_fits(eps: float) -> bool:
    """Whether ggml's norm takes this epsilon.

    It ends the process on any that is not above 0 in float32.
    """
    return 0 < ctypes.c_float(eps).value < math.inf
