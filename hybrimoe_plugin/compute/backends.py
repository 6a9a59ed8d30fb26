"""What the engine asks of compute backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from hybrimoe_plugin.device.streams import Coming
from hybrimoe_plugin.weights.layer_weights import LayerWeights


class CPUBackend(Protocol):
    """Computes experts where their bytes lie, in host memory."""

    name: str
    workers: int
    """Threads that compute beside the caller's; 0 where the caller's own do."""

    def add_layer(self, weights: LayerWeights) -> None:
        """Make a layer known; layers are numbered in the order of these calls. Raises:
        BackendError.
        """
        ...

    def submit(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        mine: Sequence[int],
    ) -> None:
        """Start one layer call; only experts in `mine` count, all others contribute nothing.

        Args:
            hidden: [T, H] floating point on the CPU.
            topk_ids: [T, K] int64 on the CPU.
            topk_weights: [T, K] float32 on the CPU; a weight belongs to the id at its own place.
        """
        ...

    def sync(self) -> torch.Tensor:
        """[T, H] of hidden's dtype: the result of the last `submit`. Valid until the next
        `submit`.
        """
        ...

    def abandon(self) -> None:
        """Wait for what `submit` may have started, wherever it was interrupted, and forget it."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class WholeCalls(Protocol):
    """A CPU backend that can compute a layer call without a plan."""

    def compute(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] of hidden's dtype: every chosen expert of every token [T, K], all on the CPU."""
        ...


class Accelerator(Protocol):
    """Computes experts whose bytes have been sent into its slots."""

    name: str
    device: torch.device

    @property
    def slots(self) -> int:
        """How many there are; 0 before `allocate` has come to its end."""
        ...

    def allocate(self, slots: int, layers: Sequence[LayerWeights]) -> None:
        """Make slots that hold any expert of these layers. Raises: BackendError, BudgetError."""
        ...

    def onload(self, slot: int, weights: LayerWeights, expert: int, ahead: bool = False) -> None:
        """Queue one expert on the link and return at once; ordered after the slot's last compute.

        Args:
            ahead: a prefetch, which demand loads overtake; the slot's next `onload` or `cancel`
                drops it if it still waits then.
        """
        ...

    def cancel(self, slot: int) -> bool:
        """Drop the slot's prefetch if it has not been given to the link; gives whether it was."""
        ...

    def compute(
        self,
        slots: Sequence[int],
        hidden: torch.Tensor,
        slot_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H] on `device`: the sum over each token's slots; waits, on the device, for the slots
        it uses.

        Args:
            slots: the slots that occur in `slot_ids`, known to the host, so that nothing need be
                read back.
            hidden: [T, H] on `device`.
            slot_ids: [T, K] int64 on `device`; -1 where the expert is not computed here.
            topk_weights: [T, K] floating point on `device`.
        """
        ...

    def bring(self, tensors: Sequence[torch.Tensor]) -> Coming:
        """Queue copies to the CPU, behind what the model has been given so far; the host does not
        wait.
        """
        ...

    def landing(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory on the CPU that this tensor can be copied to without stopping the host."""
        ...

    def coming(self, landed: list[torch.Tensor]) -> Coming:
        """What the model's work, a CUDA graph's replay included, has been told to copy to the CPU
        so far.
        """
        ...

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on `device`; the host does not wait."""
        ...

    def synchronize(self) -> None: ...

    def settle(self) -> dict[int, tuple[LayerWeights, int]]:
        """Begin anew after a call that did not end: wait for what runs, drop what waits, keep what
        is certain.

        Returns:
            slot -> (its layer's weights, expert) of every slot whose bytes have all arrived.
        """
        ...

    def wrong_slots(self, expected: Mapping[int, tuple[LayerWeights, int]]) -> list[int]:
        """Slots that neither hold nor wait for the expert that is expected there; slow, it compares
        all bytes.

        Args:
            expected: slot -> (its layer's weights, expert).
        """
        ...

    def close(self) -> None: ...
