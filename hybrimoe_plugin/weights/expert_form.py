"""What the routed experts of a layer compute, and how the model keeps their matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hybrimoe_plugin.core import SILU, Activation


class ExpertForm(NamedTuple):
    """One layer's routed experts."""

    experts: int
    hidden: int
    intermediate: int
    activation: Activation = SILU
    has_biases: bool = False
    is_transposed: bool = False
    """Whether the model keeps matrices as [E, inputs, outputs]."""
    is_interleaved: bool = False
    """Whether its rows of gate and up alternate; else gate's come first."""

    @property
    def is_rearranged(self) -> bool:
        """Whether the model keeps matrices in another way than kernels read."""
        return self.is_transposed or self.is_interleaved

    def halves(self, packed: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate, up) of what the model keeps together along a dimension."""
        if not self.is_interleaved:
            gate, up = packed.chunk(2, dim=dim)
            return gate, up
        size = packed.shape[dim]
        even = torch.arange(0, size, 2)
        return packed.index_select(dim, even), packed.index_select(dim, even + 1)
