"""What an expert computes between its two products, in torch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hybrimoe_plugin.core import Activation


def activate(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[..., I] from gate and up [..., I], as `Activation` says; neither is changed."""
    if activation.limit:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(min=-activation.limit, max=activation.limit)
    if activation.up_shift:
        up = up + activation.up_shift
    return _function(gate, activation) * up


def _function(gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    kind = activation.kind
    if kind == "gelu":
        return F.gelu(gate)
    if kind == "gelu_tanh":
        return F.gelu(gate, approximate="tanh")
    if kind == "relu":
        return F.relu(gate)
    if activation.alpha == 1.0:
        return F.silu(gate)
    return gate * torch.sigmoid(activation.alpha * gate)
