"""RMSNorm as one operation instead of six."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hybrimoe_plugin.operators.dense import DenseOperator


class LeanRMSNorm(DenseOperator):
    """`x / rms(x) * weight`, in the precision of torch's own kernel."""

    def __init__(self, key: str, gguf_loader: Any, config: Any, orig_module: Any = None, **kwargs: Any) -> None:
        super().__init__(key, gguf_loader, config, orig_module, **{**kwargs, "linears": "plain"})
        self.weight = orig_module.weight
        self.eps = float(orig_module.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] from [..., H]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
