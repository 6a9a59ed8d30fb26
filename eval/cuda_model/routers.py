"""Routers that compute as usual and then answer with given routing, on the device."""

from __future__ import annotations

import torch
from torch import nn

from hybrimoe_plugin.operators.routers import GateRouter
from hybrimoe_plugin.replay.trace import Call


class GivenGate(nn.Module):
    """A router that runs its gate and returns given ids and weights.

    Single-token ids and weights [1, K] are overwritten in place, so that CUDA graphs see them;
    those of prompts are [T, K] tensors of their own.
    """

    def __init__(self, gate: nn.Module, top_k: int) -> None:
        super().__init__()
        self.inner = gate
        device = next(gate.parameters()).device
        ids = torch.zeros(1, top_k, dtype=torch.int64, device=device)
        weights = torch.ones(1, top_k, device=device)
        self.one = ids, weights
        self.many = self.one

    def tell(self, call: Call) -> None:
        """Set what the next forward pass returns."""
        ids = torch.from_numpy(call.ids)
        weights = torch.from_numpy(call.weights)
        if len(ids) > 1:
            device = self.one[0].device
            self.many = ids.to(device), weights.to(device)
            return
        for place, value in zip(self.one, (ids, weights), strict=True):
            place.copy_(value)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, _ = self.inner(hidden)
        single = logits.numel() == logits.shape[-1]
        ids, given = self.one if single else self.many
        return logits, given.to(weights.dtype), ids


class GivenRouter(GateRouter):
    """A look-ahead router with given predictions; its gate computes only to take its usual time.

    Recorded routing holds no scores, so none are shown.
    """

    def __init__(self, gate: GivenGate) -> None:
        super().__init__(gate)
        ids = gate.one[0]
        self.foreseen = ids.clone(), ids

    def tell(self, ids: torch.Tensor) -> None:
        """Set what the next prediction returns: [T, K] int64."""
        single, _ = self.foreseen
        if len(ids) == 1:
            single.copy_(ids)
        else:
            self.foreseen = single, ids.to(single.device)

    def scores(self) -> torch.Tensor | None:
        return None

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        super().predict(hidden)
        many = hidden.shape[0] > 1
        return self.foreseen[many]
