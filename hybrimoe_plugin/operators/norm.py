"""RMSNorm as one operation instead of six."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.cpu.ggml import GraphTensor, norm_epsilon_fits
from hybrimoe_plugin.compute.cpu.ggml_function import GgmlFunction
from hybrimoe_plugin.compute.cpu.native.graph import AnyGraph
from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.injection.moved import old_names
from hybrimoe_plugin.operators.dense import DenseOperator
from hybrimoe_plugin.policy.step import FEW_ROWS

__getattr__ = old_names(__name__)


class FusedRMSNorm(DenseOperator):
    """`x / rms(x) * weight`: by ggml in float32 for a few tokens on the CPU, else by torch.

    torch's kernel keeps the precision of its input. On the CPU it is six operations again, which
    between other work take 25 to 40 us instead of 10.
    """

    by_proof = True

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **kwargs)
        self.weight = orig_module.weight
        self.eps = float(orig_module.variance_epsilon)
        if not norm_epsilon_fits(self.eps):
            self.ggml = None  # torch's kernel gives what the model asks for, even if it is NaN
        self._function: GgmlFunction | None = None
        if self.ggml is not None:
            self._function = GgmlFunction(
                self.ggml,
                lambda graph, x: [self.build(graph, x)],
                threads=1,
                learned=lambda: (self.weight,),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] from [..., H]. Raises: InputError: values of another width."""
        if x.shape[-1:] != self.weight.shape:
            raise InputError(
                f"{self.key}: expected values of width {len(self.weight)}, found {list(x.shape)}"
            )
        rows = x.numel() // x.shape[-1]
        few = rows == 1 or (x.ndim <= 3 and 1 < rows <= FEW_ROWS)  # others are of every head
        if self._function is None or not few or x.dtype != torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        (y,) = self._function(x.reshape(rows, -1), rows)
        return y.clone().view(x.shape)

    def build(
        self, graph: AnyGraph, x: GraphTensor, out: torch.Tensor | None = None
    ) -> GraphTensor:
        """[..., H] from [..., H] in a graph, into `out` where it is given."""
        weight = graph.constant(self.weight)
        return graph.rms_norm(x, weight, self.eps, out)

    def extra_repr(self) -> str:
        return f"key={self.key!r}, width={len(self.weight)}, eps={self.eps}"
