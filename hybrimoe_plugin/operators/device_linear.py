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


class DeviceLinear(DenseOperator):
    """A linear on the matrix as stored, on its rule's device: by Triton kernels, else by torch.

    The bytes lie in slot form (`compute.gpu.kernels.layout`) in a buffer, so that `to` moves them.
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
        with torch.device("cpu"):  # operators are built on the meta device
            self.register_buffer("planes", torch.empty(0, dtype=torch.uint8), persistent=False)

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
        self.planes = torch.from_numpy(to_planes(stored.data, stored.type_name))

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
        return self.type_name in SUPPORTED

    def _fused(self, flat: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return outside_autograd(self.key, lambda: self._fused(flat), flat)
        from hybrimoe_plugin.compute.gpu.kernels.linear import linear

        # Triton launches on the current device, which may be another one where a model lies on
        # several.
        with torch.cuda.device(flat.device) if flat.device.type == "cuda" else nullcontext():
            return linear(flat, self.planes, self.type_name, self.out_features)

    def dequantised(self) -> torch.Tensor:
        """[out, in] float32 on the matrix's device, fresh."""
        raw = from_planes(self.planes, self.type_name)
        return dequantize(raw, self.type_name, (self.out_features, self.in_features))

    def _plain(self, flat: torch.Tensor) -> torch.Tensor:
        return F.linear(flat, self.dequantised().to(flat.dtype))


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
