"""The protocol of the kernels that compute experts in slots."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from hybrimoe_plugin.compute.gpu.kernels.layout import Part, SlotLayout
from hybrimoe_plugin.core import ExpertSpec


class SlotCall(NamedTuple):
    """One wave of one layer call, all on one device."""

    buffer: torch.Tensor
    """[slots, slot bytes] uint8."""
    layout: SlotLayout
    """Of this layer's experts."""
    slots: tuple[int, ...]
    """The slots that occur in `slot_ids`, known to the host."""
    hidden: torch.Tensor
    """[T, H] floating point."""
    slot_ids: torch.Tensor
    """[T, K] int64; -1 where an expert is not computed here."""
    topk_weights: torch.Tensor
    """[T, K] floating point routing weights."""


class Kernels(Protocol):
    """Computes experts in two stages, so that gate and up can start before down has arrived."""

    name: str

    def refusal(self, spec: ExpertSpec) -> str | None:
        """Why these kernels cannot run experts of this shape and types, None if they can."""
        ...

    def capturable(self) -> Kernels:
        """Kernels of the same layout whose calls of one token depend on nothing but the device.

        `SlotCall.slots` may be empty there, so that a CUDA graph may read other slots each time.
        """
        ...

    def layout(self, spec: ExpertSpec) -> SlotLayout:
        """Where the matrices of such experts lie in a slot."""
        ...

    def repack(self, part: Part, raw: torch.Tensor, target: torch.Tensor) -> None:
        """Bring stored bytes [part.size] into slot form; only for parts in planes.

        Mutates: target.
        """
        ...

    def gate_up(self, call: SlotCall) -> Any:
        """What `layout.activation` makes of gate x and up x, for each routed pair with a slot."""
        ...

    def down(self, call: SlotCall, activations: Any) -> torch.Tensor:
        """[T, H] of hidden's dtype: the weighted sum over each token's slots."""
        ...
