"""What captured layers share: how to capture, and a decode step's inputs at fixed addresses."""

from __future__ import annotations

import logging
import operator
from typing import Any, Protocol

import torch

from hybrimoe_plugin.compute.attention.decode_attention import (
    AttentionKernel,
    AttentionShape,
    MaskedAttention,
)
from hybrimoe_plugin.compute.attention.kernel_choice import choose
from hybrimoe_plugin.decode.chain.slot_table import SlotTable
from hybrimoe_plugin.device.cuda_graphs import Capture
from hybrimoe_plugin.engine import Engine

log = logging.getLogger(__name__)


class Settles(Protocol):
    """A chain of layers (`decode.chain`)."""

    def settle(self) -> None:
        """Make the outputs right that it has given out."""
        ...


class DecodeState:
    """What the captured layers of one device share in steps of one sequence.

    Graphs read a step's inputs at fixed addresses. Every layer sets them before its replay, and
    only a step's first layer has work to do.

    Attributes:
        batch: sequences that have one token each in a step.
        capture: records graphs.
        device: of the layers.
        refusals: how many layers run eagerly from now on.
        position: [1] int64, the cache entry of this step's token.
        hidden: [batch, 1, H], the input of whichever layer runs; a layer leaves its output there
            for the next one. None before the first capture.
        layers: how many layers share this.
    """

    batch = 1

    def __init__(self, capture: Capture, device: torch.device) -> None:
        self.capture = capture
        self.refusals = 0
        self.layers = 0
        self.device = device
        with torch.inference_mode(False):
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.hidden: torch.Tensor | None = None
        self.chains: list[Settles] = []
        """Of layers that may be launched before it is known that their input is right."""
        self.tables: dict[Engine, SlotTable] = {}
        self._kernels: dict[tuple[AttentionShape, bool], AttentionKernel] = {}
        """By shape, and whether it is to be torch's."""
        self._held = -1
        """The step's number of tokens held, which is its position; -1 where it is not known."""
        self._given: tuple[torch.Tensor, ...] = ()
        """The step's position embeddings, as the model gave them."""
        self._given_as: Any = None
        """The tuple or tensor in which it gave them; None where it is of another kind."""
        self._fixed: tuple[torch.Tensor, ...] = ()
        """Their copies at fixed addresses."""
        self._is_tuple = True

    @property
    def position_embeddings(self) -> Any:
        """Position embeddings at fixed addresses, in the form in which the model gives them."""
        return self._fixed if self._is_tuple else self._fixed[0]

    def set_step(self, held: int, position_embeddings: Any) -> bool:
        """Set the step's inputs.

        Args:
            held: tokens that the cache holds before the step.
            position_embeddings: as the model gives them.

        Returns:
            whether they are of the kind that graphs were made for.
        """
        if held == self._held and position_embeddings is self._given_as:
            return True
        is_tuple = not isinstance(position_embeddings, torch.Tensor)
        given = tuple(position_embeddings) if is_tuple else (position_embeddings,)
        if not self._fixed:
            self._is_tuple = is_tuple
            with torch.inference_mode(False):
                self._fixed = tuple(map(self._place_for, given))
        if held != self._held or not _are_same(given, self._given):
            self.settle()  # by the step that its layers were launched for
        if held != self._held:
            self._held = -1  # unknown until all of it is set: an interrupted step leaves a part
            self._set_position(held)
            self._held = held
        if _are_same(given, self._given):
            return True
        self._given_as = None
        if not _are_alike(given, self._fixed):
            return False
        self._given = ()
        for fixed, part in zip(self._fixed, given, strict=True):
            fixed.copy_(part)
        self._given = given
        if not is_tuple or type(position_embeddings) is tuple:
            self._given_as = position_embeddings
        return True

    def settle(self) -> None:
        """Make every layer's output right that was given out so far."""
        for chain in self.chains:
            chain.settle()

    def hidden_like(self, hidden: torch.Tensor) -> torch.Tensor:
        """The input's place at a fixed address, for hidden states of this kind; mutates."""
        known = self.hidden
        if known is None or known.shape != hidden.shape or known.dtype != hidden.dtype:
            with torch.inference_mode(False):
                self.hidden = known = torch.zeros_like(hidden)
        return known

    def set_dummy_step(self, position: int) -> None:
        """Set inputs unlike any step's, so that a capture that freezes its own step's is found."""
        self._held = -1  # first: an interrupt leaves a step that is not known
        self._given = ()
        self._given_as = None
        self._set_position(position)
        for part in self._fixed:
            part.fill_(0.5)

    def kernel_for(self, shape: AttentionShape, plain: bool = False) -> AttentionKernel:
        """Attention for this shape, searched for once.

        Args:
            plain: torch's, whatever is faster.
        """
        key = shape, plain
        if key not in self._kernels:
            # Caches of smaller capacity are full by now, in every layer.
            self._kernels = {
                known: kernel
                for known, kernel in self._kernels.items()
                if known[0].capacity >= shape.capacity
            }
            self._kernels[key] = self._new_kernel(shape, plain)
            self._held = -1  # so that the next `set_step` plans for it too
        return self._kernels[key]

    def _new_kernel(self, shape: AttentionShape, plain: bool) -> AttentionKernel:
        if plain:
            return MaskedAttention(shape, self.device)
        return choose(shape, self.device, self.capture, self.position, max(1, self.layers))

    def still_plans(self, kernel: AttentionKernel) -> bool:
        """Whether steps are planned for the kernel that a layer was captured with."""
        return any([kernel is known for known in self._kernels.values()])  # noqa: C419 - faster

    def drop_kernels(self, reason: str) -> bool:
        """Use torch's attention from now on; returns whether there was any other."""
        others = {
            key: kernel.name
            for key, kernel in self._kernels.items()
            if not isinstance(kernel, MaskedAttention)
        }
        for name in sorted(set(others.values())):
            log.warning("%s is not used on %s any more: %s", name, self.device, reason)
        for key in others:
            shape, _ = key
            self._kernels[key] = MaskedAttention(shape, self.device)
        self._held = -1
        return bool(others)

    def note_refusal(self, reason: str) -> None:
        """Say once why a layer runs eagerly from now on."""
        self.refusals += 1
        level = logging.WARNING if self.refusals == 1 else logging.INFO
        log.log(
            level,
            "CUDA graphs are not used on %s for a layer: %s; decoding goes on without its graphs",
            self.device,
            reason,
        )

    def _set_position(self, position: int) -> None:
        self.position.fill_(position)
        for kernel in self._kernels.values():
            if position < kernel.shape.capacity:
                self._plan(kernel, position)

    def _place_for(self, part: torch.Tensor) -> torch.Tensor:
        """Memory for a part of position embeddings, at the address that graphs read."""
        if part.ndim == 3 and len(part) == 1:  # [1, 1, D]: the same position for all sequences
            part = part.expand(self.batch, -1, -1)
        return torch.zeros_like(part, memory_format=torch.contiguous_format)

    def _plan(self, kernel: AttentionKernel, position: int) -> None:
        kernel.plan(position)


def _are_same(given: tuple[torch.Tensor, ...], before: tuple[torch.Tensor, ...]) -> bool:
    # `is`, on tensors that are kept: no later step's can be taken for them.
    return len(given) == len(before) and all(map(operator.is_, given, before))


def _are_alike(given: tuple[torch.Tensor, ...], fixed: tuple[torch.Tensor, ...]) -> bool:
    if len(given) != len(fixed):
        return False
    pairs = zip(given, fixed, strict=True)
    return all(_is_alike(one, other) for one, other in pairs)


def _is_alike(given: torch.Tensor, fixed: torch.Tensor) -> bool:
    """Whether position embeddings can be copied there: each sequence's, or one for all."""
    if given.dtype != fixed.dtype or given.shape[1:] != fixed.shape[1:]:
        return False
    return len(given) == len(fixed) or (given.ndim == 3 and len(given) == 1)
