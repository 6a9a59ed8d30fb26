"""The output head of a target on flash, computed by an accelerator."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class DeviceHead(nn.Module):
    """Projects hidden states with a copy of the head's weight on the accelerator.

    The CPU's weight stays where it was: the embedding may be tied to it, and drafts are made from
    it.

    Args:
        head: the target's own, on the CPU and without bias.
        device: the accelerator.
    """

    def __init__(self, head: nn.Linear, device: torch.device) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = None
        self._copy = head.weight.detach().to(device, copy=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] from hidden states [..., H], where the hidden states are."""
        return F.linear(hidden.to(self._copy.device), self._copy).to(hidden.device)
