"""Dense linears that stay quantised in accelerator memory.

They take about a quarter of bfloat16's bytes, to hold and to read in decode.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.gpu.kernels.formats.description import SUPPORTED
from hybrimoe_plugin.compute.gpu.kernels.layout import from_planes, to_planes
from hybrimoe_plugin.compute.gradients import outside_autograd
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.weights.dequant import dequantize, supported
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_VALUES_AT_A_TIME = 1 << 20
"""Values that are dequantised at a time: float32 takes several times the result's memory."""


class DeviceLinear(DenseOperator):
    """A linear on the matrix as stored, on its rule's device: by Triton kernels, else by torch.

    The bytes lie in slot form (`compute.gpu.kernels.layout`) in a buffer, so that `to` moves them.
    A matrix in a type without a Triton kernel is dequantised once, to the dtype that the plain
    linear would have: at each call that would take longer than the product.
    """

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
        self.bias = orig_module.bias
        self.type_name = ""
        self.planes: torch.Tensor
        """The stored bytes; empty where the matrix is dequantised."""
        self.dense: torch.Tensor
        """[out, in] dequantised; empty where the type has a kernel."""
        dtype = orig_module.weight.dtype
        with torch.device("cpu"):  # operators are built on the meta device
            self.register_buffer("planes", torch.empty(0, dtype=torch.uint8), persistent=False)
            self.register_buffer("dense", torch.empty(0, dtype=dtype), persistent=False)

    def take(self, stored: QuantizedMatrix) -> None:
        """Use this matrix [out, in].

        Raises:
            BackendError: a type that cannot be computed on a device, or another shape.
        """
        shape = self.out_features, self.in_features
        if stored.shape != shape:
            raise BackendError(f"{self.key}: expected a matrix {shape}, found {stored.shape}")
        if stored.type_name not in supported():
            raise BackendError(
                f"{self.key}: GGML type {stored.type_name} cannot be computed on a device; "
                f"possible are "
                f"{', '.join(supported())}. Leave this module to its own class"
            )
        self.type_name = stored.type_name
        if self.dense_bytes(stored.type_name):
            self.dense = _dequantised(stored, self.dense.dtype)
        else:
            self.planes = torch.from_numpy(to_planes(stored.data, stored.type_name))

    def dense_bytes(self, type_name: str) -> int:
        """Bytes of the matrix once it is dequantised; 0 for types that stay as stored."""
        if stays_stored(type_name):
            return 0
        return self.out_features * self.in_features * self.dense.element_size()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] of x's dtype from [..., M]."""
        if not self.type_name:
            raise BackendError(f"{self.key}: the linear was not given its matrix")
        flat = x.reshape(-1, self.in_features)
        y = self._fused(flat) if self._has_kernel() else self._plain(flat)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _has_kernel(self) -> bool:
        if not _runs_triton(self.planes.device) or not _triton_installed():
            return False
        return stays_stored(self.type_name)

    def _fused(self, flat: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return outside_autograd(self.key, lambda: self._fused(flat), flat)
        from hybrimoe_plugin.compute.gpu.kernels.linear import linear

        # Triton launches on the current device, which may be another one where a model lies on
        # several.
        with torch.cuda.device(flat.device) if flat.device.type == "cuda" else nullcontext():
            return linear(flat, self.planes, self.type_name, self.out_features)

    def dequantised(self) -> torch.Tensor:
        """[out, in] float32 on the matrix's device; not to be written to."""
        if self.dense.numel():
            return self.dense.float()
        raw = from_planes(self.planes, self.type_name)
        return dequantize(raw, self.type_name, (self.out_features, self.in_features))

    def _plain(self, flat: torch.Tensor) -> torch.Tensor:
        matrix = self.dense if self.dense.numel() else self.dequantised()
        return F.linear(flat, matrix.to(flat.dtype))


def _dequantised(stored: QuantizedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] of this dtype on the CPU, made a few rows at a time."""
    rows, columns = stored.shape
    data = stored.data.reshape(rows, -1)
    made = torch.empty(rows, columns, dtype=dtype, device="cpu")
    step = max(1, _VALUES_AT_A_TIME // columns)
    for start in range(0, rows, step):
        part = torch.from_numpy(data[start : start + step].copy())
        made[start : start + step] = dequantize(part, stored.type_name, (len(part), columns))
    return made


def stays_stored(type_name: str) -> bool:
    """Whether a type has a Triton kernel, or there is no Triton and all take the same twin."""
    if not _triton_installed():
        return True
    return type_name in SUPPORTED


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
