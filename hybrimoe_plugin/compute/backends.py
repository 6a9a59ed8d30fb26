"""The protocols that the engine expects of compute backends: the CPU and an accelerator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.device.streams import PendingCopy
from hybrimoe_plugin.weights.layer_weights import LayerWeights


class CPUBackend(Protocol):
    """Computes experts on the CPU, from their bytes in host memory."""

    name: str
    workers: int
    """Threads that compute beside the caller's; 0 where the caller's own threads compute."""

    def add_layer(self, weights: LayerWeights) -> None:
        """Register a layer; layers are numbered in the order of these calls.

        Raises:
            BackendError: the backend cannot run this layer.
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
        """Start one layer call; experts outside `mine` contribute nothing.

        Args:
            hidden: [T, H] floating point on the CPU.
            topk_ids: [T, K] int64 on the CPU.
            topk_weights: [T, K] float32 on the CPU; a weight belongs to the id at its own place.
            mine: the experts that this backend computes.
        """
        ...

    def sync(self) -> torch.Tensor:
        """[T, H] of hidden's dtype: the result of the last `submit`.

        Valid until the next `submit`.
        """
        ...

    def abandon(self) -> None:
        """Wait for what `submit` may have started, wherever it was interrupted, and drop it."""
        ...

    def close(self) -> None:
        """Give back threads and memory."""
        ...


@runtime_checkable
class WholeCalls(Protocol):
    """A CPU backend that can compute a layer call without a plan."""

    def compute(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] of hidden's dtype: every chosen expert of every token [T, K], all on the CPU."""
        ...


class WaveCalls(Protocol):
    """The accelerator's share of one layer call, wave by wave."""

    def compute(self, index: int) -> None:
        """Queue one wave. The device, not the host, waits for the slots that are used."""
        ...

    def output(self) -> torch.Tensor:
        """[T, H] on the device: the weighted sums over each token's experts in all waves."""
        ...


class Accelerator(Protocol):
    """Computes experts whose bytes have been sent into its slots."""

    name: str
    device: torch.device

    @property
    def slots(self) -> int:
        """Number of slots; 0 until `allocate` has finished."""
        ...

    def allocate(self, slots: int, layers: Sequence[LayerWeights]) -> None:
        """Make slots that hold any expert of these layers, but of those that stay on the CPU.

        Raises:
            BackendError: no kernel takes any of the layers.
            BudgetError: the memory is not there.
        """
        ...

    def onload(self, slot: int, weights: LayerWeights, expert: int, ahead: bool = False) -> None:
        """Queue one expert on the link and return at once; ordered after the slot's last compute.

        Args:
            ahead: a prefetch, which demand loads overtake. The slot's next `onload` or `cancel`
                drops it if it still waits then.
        """
        ...

    def cancel(self, slot: int) -> bool:
        """Drop the slot's prefetch if the link has not got it yet; returns whether it did."""
        ...

    def compute(
        self,
        slots: Sequence[int],
        hidden: torch.Tensor,
        slot_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H] on `device`: the weighted sum over each token's slots.

        The device, not the host, waits for the slots that are used.

        Args:
            slots: the slots that occur in `slot_ids`, known to the host, so that nothing need be
                read back.
            hidden: [T, H] on `device`.
            slot_ids: [T, K] int64 on `device`; -1 for an expert that is computed elsewhere.
            topk_weights: [T, K] floating point on `device`.
        """
        ...

    def prompt_call(
        self,
        weights: LayerWeights,
        waves: Sequence[Mapping[int, int]],
        ids: NDArray[np.int64],
        hidden: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> WaveCalls | None:
        """A layer call of many tokens; None where each wave is to be given to `compute`.

        Args:
            weights: of the layer.
            waves: expert -> slot of what is computed in one launch, in order; none of them empty.
            ids: [T, K] on the host: the experts of each token.
            hidden: [T, H] on `device`.
            topk_weights: [T, K] floating point on `device`.
        """
        ...

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> PendingCopy:
        """Queue copies to the CPU behind the model's work so far; the host does not wait."""
        ...

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """CPU memory that this tensor can be copied to without stopping the host."""
        ...

    def pending_copy(self, tensors: list[torch.Tensor]) -> PendingCopy:
        """The CPU tensors that the model's work so far copies into, CUDA graph replays included."""
        ...

    def copy_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on `device`; the host does not wait."""
        ...

    def send_slot_ids(self, ids: Sequence[int], waves: int) -> Sequence[torch.Tensor]:
        """[1, K] int64 on `device` for each wave of one token's call; the host does not wait.

        Valid until the next call.

        Args:
            ids: K for each wave, one wave after the other.
        """
        ...

    def send_slot_table(self, ids: NDArray[np.int64]) -> Sequence[torch.Tensor]:
        """[T, K] int64 on `device` for each wave of a call of few tokens; the host does not wait.

        Valid until the next call.

        Args:
            ids: [W, T, K].
        """
        ...

    def synchronize(self) -> None:
        """Make the host wait for everything."""
        ...

    def settle(self) -> dict[int, tuple[LayerWeights, int]]:
        """Restart after an unfinished call: wait for what runs, drop what waits.

        Returns:
            slot -> (its layer's weights, expert) of every slot whose bytes have all arrived.
        """
        ...

    def wrong_slots(self, expected: Mapping[int, tuple[LayerWeights, int]]) -> list[int]:
        """Slots that neither hold nor wait for their expected expert; slow, compares all bytes.

        Args:
            expected: slot -> (its layer's weights, expert).
        """
        ...

    def close(self) -> None:
        """Give back threads and memory."""
        ...


@runtime_checkable
class ResidentExperts(Accelerator, Protocol):
    """An accelerator that also computes slots which the device alone chooses, inside a graph."""

    @property
    def memory(self) -> torch.Tensor:
        """The slots' memory: graphs that read it are void once it is another tensor."""
        ...

    def refusal(self, weights: LayerWeights) -> str:
        """Why a layer's experts cannot be computed by `resident`; empty where they can."""
        ...

    def resident(
        self,
        weights: LayerWeights,
        hidden: torch.Tensor,
        slot_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `compute`, of slots that only the device knows; no operation depends on the host.

        All bytes must be there. `used_layer` must follow whenever a graph of it is launched.
        """
        ...

    def wait_for(self, slots: Sequence[int]) -> None:
        """Let what is launched from now on come after the arrival of these slots' bytes.

        Raises:
            BackendError: a slot was never filled, or any transfer has failed.
        """
        ...

    def pump(self) -> None:
        """Give the device waiting prefetches for which the link has room; `compute` does so too."""
        ...

    def used_layer(self, weights: LayerWeights) -> None:
        """Note that the device's work so far may read any slot that holds an expert of a layer."""
        ...

    def arrived(self, slot: int) -> bool:
        """Whether all that a slot was last sent is there for what is launched from now on.

        The host does not wait.
        """
        ...
