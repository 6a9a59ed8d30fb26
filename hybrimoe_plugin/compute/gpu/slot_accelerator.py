"""An accelerator whose slots hold quantised experts: CUDA, or emulated on the CPU.

Both run the same code; only streams and host memory differ. The emulated one has no clock: the
engine advances time as the machine profile says, and labels every such number.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.gpu.direct_proof import what_is_wrong
from hybrimoe_plugin.compute.gpu.host_bytes import HostBytes, PlainBytes
from hybrimoe_plugin.compute.gpu.kernels.base import Kernels, PromptKernels, SlotCall
from hybrimoe_plugin.compute.gpu.kernels.layout import SlotLayout
from hybrimoe_plugin.compute.gpu.kernels.tiles import SortedPairs, mean_load
from hybrimoe_plugin.compute.gpu.kernels.tuning import Tunable
from hybrimoe_plugin.compute.gpu.layer_path import LayerPath, layer_path
from hybrimoe_plugin.compute.gpu.prompt_call import PromptCall
from hybrimoe_plugin.compute.gpu.repack_buffers import REPACK_BUFFERS
from hybrimoe_plugin.compute.gpu.slot_ids import SlotIdSenders
from hybrimoe_plugin.compute.gpu.slot_kernels import on_cpu
from hybrimoe_plugin.compute.gpu.slot_transfers import AHEAD_DEPTH, SlotTransfers, Transfer
from hybrimoe_plugin.compute.gpu.transfer_executor import InlineExecutor, ThreadExecutor
from hybrimoe_plugin.device.cuda_timer import cuda_timer
from hybrimoe_plugin.device.streams import HostStreams, PendingCopy, Streams
from hybrimoe_plugin.errors import BudgetError
from hybrimoe_plugin.weights.layer_weights import LayerWeights

log = logging.getLogger(__name__)


class SlotAccelerator:
    """Slots of quantised experts on one device.

    Args:
        kernels: fused Triton kernels or the reference in torch operations.
        streams: the device's queues; by default those of the emulated device.
        host: where transfers read from; by default the stored bytes themselves.
        fallback: the kernels for layers of which `kernels` refuse every one.
        ahead_depth: most prefetches that the device has at once, at least 1; see `AHEAD_DEPTH`.
        direct: send experts by address where streams and host memory allow; False for the plain
            twin, which makes every copy with torch.
    """

    def __init__(
        self,
        device: torch.device,
        name: str,
        kernels: Kernels,
        streams: Streams | None = None,
        host: HostBytes | None = None,
        fallback: Kernels | None = None,
        ahead_depth: int = AHEAD_DEPTH,
        direct: bool = True,
    ) -> None:
        if ahead_depth < 1:
            raise ValueError(f"ahead_depth: expected at least 1, found {ahead_depth}")
        self.name = name
        self.device = device
        self.kernels = kernels
        self.streams = streams or HostStreams()
        self._host = host or PlainBytes()
        self._fallback = fallback
        self._ahead_depth = ahead_depth
        self._direct = direct
        self._paths: dict[int, LayerPath] = {}
        """By the id of a layer's weights; empty where experts go the plain way."""
        self._buffer = torch.empty(0, 0, dtype=torch.uint8)
        self._transfers = self._make_transfers(0)
        self._slot_ids = SlotIdSenders(self.streams, device)
        self._prompt_kernels: PromptKernels | None = None
        """`kernels`, where they are some: asked once, since each question costs the host 10 us."""
        self._allocated = False
        self._layers: tuple[LayerWeights, ...] = ()
        """Kept alive, so that no other layer gets the id of one of them."""
        self._layouts: dict[int, SlotLayout] = {}
        """By the id of a layer's weights.

        Hashing or making a layout for every transfer would cost as much as the transfer.
        """

    @property
    def cancelled(self) -> int:
        """Prefetches that were superseded before they crossed the link."""
        return self._transfers.cancelled

    @property
    def slots(self) -> int:
        return len(self._buffer) if self._allocated else 0

    def on_cpu(self, layers: Sequence[LayerWeights]) -> dict[int, str]:
        """Positions of the layers that stay on the CPU, with the reasons: they get no slots.

        Raises:
            BackendError: no kernel takes any of the layers.
        """
        chosen, found = on_cpu(self.kernels, self._fallback, layers, str(self.device))
        if chosen is not self.kernels:
            reason = self.kernels.refusal(layers[0].spec)
            log.warning("%s; experts on %s use torch operations", reason, self.device)
            self.kernels = chosen
        return found

    def allocate(self, slots: int, layers: Sequence[LayerWeights]) -> None:
        """As the protocol says.

        Raises:
            BackendError: no kernel takes any of the layers.
            BudgetError: the memory is not there.
        """
        refused = self.on_cpu(layers)
        layers = [weights for place, weights in enumerate(layers) if place not in refused]
        self._layers = tuple(layers)
        self._layouts = {id(weights): self.kernels.layout(weights.spec) for weights in layers}
        self._prompt_kernels = self.kernels if isinstance(self.kernels, PromptKernels) else None
        layouts = self._layouts.values()
        size = max(layout.size for layout in layouts)
        repack_bytes = max(layout.largest_planar for layout in layouts)
        self._drop()  # given back before the new slots are taken
        self._host.prepare(layers)
        try:
            self._buffer = torch.empty(slots, size, dtype=torch.uint8, device=self.device)
            if self._direct and slots and self.streams.takes_addresses:
                self._paths = self._make_paths(layers)
            self._transfers = self._make_transfers(repack_bytes)
        except (RuntimeError, MemoryError) as error:  # CUDA out of memory is a RuntimeError
            self._drop()
            raise BudgetError(
                f"{slots} slots of {size} bytes and {REPACK_BUFFERS} repack buffers of "
                f"{repack_bytes} do not fit on {self.device}: {error}"
            ) from error
        if self.device.type == "cuda":
            self._prove(layers, repack_bytes)
            if isinstance(self.kernels, Tunable):
                self._tune(self.kernels, layers)
        self._allocated = True

    def onload(self, slot: int, weights: LayerWeights, expert: int, ahead: bool = False) -> None:
        layout = self._layouts.get(id(weights)) or self.kernels.layout(weights.spec)
        self._transfers.send(Transfer(slot, layout, weights, expert), ahead)

    def cancel(self, slot: int) -> bool:
        return self._transfers.cancel(slot)

    def pump(self) -> None:
        """Give the device waiting prefetches for which the link has room; `compute` does so too."""
        self._transfers.pump()

    def arrived(self, slot: int) -> bool:
        """Whether a slot's bytes are all there for what is launched from now on.

        They have arrived, or compute waits for them already. The host does not wait.

        Raises:
            BackendError: the slot's transfer has failed.
        """
        return self._transfers.arrived(slot)

    def used_layer(self, weights: LayerWeights) -> None:
        """Note that work queued so far may use every slot that holds an expert of this layer.

        For work that looks its slots up on the device; to be called before the next `onload`.
        """
        self._transfers.used_layer(weights)

    def compute(
        self,
        slots: Sequence[int],
        hidden: torch.Tensor,
        slot_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        # Triton launches on the current device, which is another where a model lies on several.
        if self.streams.elsewhere():
            with torch.cuda.device(self.device):
                return self.compute(slots, hidden, slot_ids, topk_weights)
        transfers = self._transfers
        transfers.pump()
        layout = transfers.wait_gate_up(slots)
        call = SlotCall(self._buffer, layout, tuple(slots), hidden, slot_ids, topk_weights)
        activations = self.kernels.gate_up(call)
        transfers.wait_down(slots)
        output = self.kernels.down(call, activations)
        transfers.used(slots)
        return output

    @property
    def memory(self) -> torch.Tensor:
        """As `ResidentExperts` says."""
        return self._buffer

    def refusal(self, weights: LayerWeights) -> str:
        """As `ResidentExperts` says."""
        if id(weights) in self._layouts:
            return ""
        return f"the experts of layer {weights.layer} stay on the CPU"

    def wait_for(self, slots: Sequence[int]) -> None:
        self._transfers.wait_all(slots)

    def resident(
        self,
        weights: LayerWeights,
        hidden: torch.Tensor,
        slot_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `ResidentExperts` says."""
        kernels = self.kernels.capturable()
        layout = self._layouts[id(weights)]
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            call = SlotCall(self._buffer, layout, (), hidden, slot_ids, topk_weights)
            return kernels.down(call, kernels.gate_up(call))

    def prompt_call(
        self,
        weights: LayerWeights,
        waves: Sequence[Mapping[int, int]],
        ids: NDArray[np.int64],
        hidden: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> PromptCall | None:
        kernels = self._prompt_kernels
        if kernels is None:
            return None
        layout = self._layouts[id(weights)]
        if not kernels.tiles(layout, len(ids), mean_load(ids, waves)):
            return None
        pairs = SortedPairs(ids, weights.spec.experts)
        return PromptCall(
            kernels,
            self._transfers,
            waves,
            pairs,
            self._buffer,
            layout,
            hidden,
            topk_weights,
            self.copy_to_device,
        )

    def copy_to_host(self, tensors: Sequence[torch.Tensor]) -> PendingCopy:
        return self.streams.copy_to_host(tensors)

    def pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.streams.pinned_like(tensor)

    def pending_copy(self, tensors: list[torch.Tensor]) -> PendingCopy:
        return self.streams.pending_copy(tensors)

    def copy_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.streams.copy_to_device(tensor)

    def send_slot_ids(self, ids: Sequence[int], waves: int) -> Sequence[torch.Tensor]:
        return self._slot_ids.of(waves, 1, len(ids) // waves).send(ids)

    def send_slot_table(self, ids: NDArray[np.int64]) -> Sequence[torch.Tensor]:
        return self._slot_ids.of(*ids.shape).send_table(ids)

    def synchronize(self) -> None:
        """Make the host wait for everything. Raises: BackendError: a transfer has failed."""
        self._transfers.drain()
        self.streams.synchronize()
        self._transfers.check()

    def settle(self) -> dict[int, tuple[LayerWeights, int]]:
        self._transfers.settle()
        held = self._transfers.held
        return {slot: (transfer.weights, transfer.expert) for slot, transfer in held.items()}

    def wrong_slots(self, expected: Mapping[int, tuple[LayerWeights, int]]) -> list[int]:
        self.synchronize()
        wrong = []
        for slot, (weights, expert) in expected.items():
            if not self._transfers.holds(slot, weights, expert):
                wrong.append(slot)
        return wrong

    def close(self) -> None:
        self._drop()
        self._host.release()

    def _drop(self) -> None:
        """Give the slots back."""
        self._allocated = False
        # Before the device is waited for: this gives it the last of its work.
        self._transfers.close()
        self.streams.synchronize()
        self._paths = {}
        self._buffer = torch.empty(0, 0, dtype=torch.uint8)
        self._transfers = self._make_transfers(0)
        self._slot_ids = SlotIdSenders(self.streams, self.device)

    def _make_paths(self, layers: Sequence[LayerWeights]) -> dict[int, LayerPath]:
        """How the experts of each layer are sent by address."""
        paths = {}
        for weights in layers:
            layout = self._layouts[id(weights)]
            paths[id(weights)] = layer_path(weights, layout, self._host, self.kernels)
        return paths

    def _prove(self, layers: Sequence[LayerWeights], repack_bytes: int) -> None:
        """Keep sending by address only if it brings the right bytes on this device.

        One expert of each layout is tried. The slots are empty before and after.
        """
        if not self._paths:
            return
        first_of = {self._layouts[id(weights)]: weights for weights in reversed(layers)}
        samples = [Transfer(0, layout, weights, 0) for layout, weights in first_of.items()]
        wrong = what_is_wrong(self._transfers, self.streams, self._buffer, samples)
        if wrong is None:
            return
        log.warning(
            "experts are sent to %s with torch's own copies, which cost the host more: %s",
            self.device,
            wrong,
        )
        self._paths = {}
        self._transfers = self._make_transfers(repack_bytes)

    def _make_transfers(self, repack_bytes: int) -> SlotTransfers:
        """Traffic for the buffer as it is now."""
        threaded = self._host.slow and len(self._buffer)
        executor = ThreadExecutor() if threaded else InlineExecutor()
        return SlotTransfers(
            self.streams,
            self.kernels,
            self._host,
            self._buffer,
            repack_bytes,
            self._ahead_depth,
            executor,
            self._paths,
        )

    def _tune(self, kernels: Tunable, layers: Sequence[LayerWeights]) -> None:
        """Choose kernels for these layers, and tile sizes for each shape among them."""
        shapes = {(self._layouts[id(weights)], weights.spec.top_k) for weights in layers}
        with torch.cuda.device(self.device):
            kernels.prove(tuple(shapes), self._buffer)
            for layout, top_k in shapes:
                kernels.tune(layout, top_k, self._buffer, cuda_timer(self.device))
