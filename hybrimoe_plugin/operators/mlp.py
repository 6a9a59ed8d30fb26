"""Dense SwiGLU MLPs: shared experts, and the first layers of DeepSeek models."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.cpu.ggml import GraphTensor
from hybrimoe_plugin.compute.cpu.ggml_function import GgmlFunction
from hybrimoe_plugin.compute.cpu.native.graph import AnyGraph
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.injection.moved import old_names
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.operators.linear import keep_quantized

__getattr__ = old_names(__name__)


class FusedMLP(DenseOperator):
    """down(silu(gate(x)) * up(x)) as one graph on the matrices as stored, else as plain linears.

    Raises:
        BackendError: linears with biases.
    """

    by_proof = True
    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **kwargs)
        names = ("gate_proj", "up_proj", "down_proj")
        if any(getattr(orig_module, name).bias is not None for name in names):
            raise BackendError(f"{key}: linears with biases are not supported")
        for name in names:
            linear = getattr(orig_module, name)
            setattr(self, name, keep_quantized(self, name, linear))
        self._function: GgmlFunction | None = None
        if self.ggml is not None:
            self._function = GgmlFunction(self.ggml, lambda graph, x: [self.build(graph, x)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] from [..., H]."""
        if self._function is None:
            inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
            plain: torch.Tensor = self.down_proj(inner)
            return plain
        flat = x.reshape(-1, x.shape[-1])
        (y,) = self._function(flat, len(flat))
        return y.to(x.dtype, copy=True).view(x.shape)

    def build(self, graph: AnyGraph, x: GraphTensor) -> GraphTensor:
        """[..., H] from [..., H] in a graph."""
        gate = self.gate_proj.build(graph, x)
        up = self.up_proj.build(graph, x)
        inner = graph.silu_mul(gate, up)
        return self.down_proj.build(graph, inner)
