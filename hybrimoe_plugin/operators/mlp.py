"""Dense SwiGLU: shared experts and the first layers of DeepSeek models."""

from __future__ import annotations

from typing import Any

import torch

from hybrimoe_plugin.compute.cpu.ggml import Graph, GraphTensor
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.injection.moved import old_names
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.operators.linear import RowGraphs, as_stored

__getattr__ = old_names(__name__)


class FusedMLP(DenseOperator):
    """down(silu(gate(x)) * up(x)) as one graph on the matrices as stored; as plain linears where
    that cannot be.

    Raises:
        BackendError: another activation, or linears with biases.
    """

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def __init__(
        self, key: str, gguf_loader: Any, config: Any, orig_module: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **kwargs)
        if getattr(config, "hidden_act", "silu") != "silu":
            raise BackendError(
                f"{key}: activation {config.hidden_act!r} is not supported, only silu"
            )
        names = ("gate_proj", "up_proj", "down_proj")
        if any(getattr(orig_module, name).bias is not None for name in names):
            raise BackendError(f"{key}: linears with biases are not supported")
        for name in names:
            setattr(self, name, as_stored(self, name, getattr(orig_module, name)))
        self._graphs = None
        if self.ggml is not None:
            self._graphs = RowGraphs(self.ggml, lambda graph, x: [self.build(graph, x)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] from [..., H]."""
        if self._graphs is None:
            plain: torch.Tensor = self.down_proj(
                torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
            )
            return plain
        flat = x.reshape(-1, x.shape[-1])
        (y,) = self._graphs(flat, len(flat))
        return y.to(x.dtype, copy=True).view(x.shape)

    def build(self, graph: Graph, x: GraphTensor) -> GraphTensor:
        """[..., H] from [..., H] in a graph."""
        inner = graph.silu_mul(self.gate_proj.build(graph, x), self.up_proj.build(graph, x))
        return self.down_proj.build(graph, inner)
