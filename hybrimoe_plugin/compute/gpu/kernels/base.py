"""The protocol of the kernels that compute experts in slots."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from hybrimoe_plugin.compute.gpu.kernels.layout import Part, SlotLayout
from hybrimoe_plugin.compute.gpu.kernels.tiles import Tiles
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


class PromptWave(NamedTuple):
    """One wave of a layer call of many tokens, all on one device.

    The waves of a call share `activations` and `parts`: each pair of a token and an expert has its
    own row there.
    """

    buffer: torch.Tensor
    """[slots, slot bytes] uint8."""
    layout: SlotLayout
    """Of this layer's experts."""
    hidden: torch.Tensor
    """[T, H] floating point, contiguous."""
    topk_weights: torch.Tensor
    """[T, K] floating point routing weights, contiguous."""
    tiles: Tiles
    activations: torch.Tensor
    """[T * K, I] of hidden's dtype, in the order of `tiles.order`."""
    parts: torch.Tensor
    """[T * K, H] of hidden's dtype: each pair's share of its token's sum."""


def prompt_rows(
    hidden: torch.Tensor, top_k: int, inner: int, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(activations, parts) for the waves of a call.

    Args:
        hidden: [T, H] floating point.
        inner: I, the experts' intermediate size.
        whole: whether every pair is computed in one of the waves; the parts of others must be 0.
    """
    pairs = len(hidden) * top_k
    activations = hidden.new_empty(pairs, inner)
    make_parts = hidden.new_empty if whole else hidden.new_zeros
    return activations, make_parts(pairs, hidden.shape[1])


def token_sums(parts: torch.Tensor, tokens: int) -> torch.Tensor:
    """[T, H]: the sums over each token's rows of `parts` [T * K, H]."""
    return parts.view(tokens, -1, parts.shape[1]).sum(dim=1)


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


@runtime_checkable
class PromptKernels(Protocol):
    """Kernels that compute many tokens in tiles which the host has cut."""

    def tiles(self, layout: SlotLayout, tokens: int, load: float) -> bool:
        """Whether a layer call is theirs.

        Args:
            layout: of the layer's experts.
            tokens: T of the call, at least 2.
            load: mean number of tokens of the experts that are computed here.
        """
        ...

    def tile_tokens(self, layout: SlotLayout, top_k: int, pairs: int, slots: int) -> int:
        """Most pairs of a tile, for a wave of so many pairs and slots."""
        ...

    def gate_up_prompt(self, wave: PromptWave) -> None:
        """What `layout.activation` makes of gate x and up x. Mutates: wave.activations."""
        ...

    def down_prompt(self, wave: PromptWave) -> None:
        """Down, times the routing weights; other pairs keep theirs. Mutates: wave.parts."""
        ...
