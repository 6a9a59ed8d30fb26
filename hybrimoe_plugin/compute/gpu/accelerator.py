"""An accelerator whose slots hold quantised experts: CUDA, or emulated on the CPU.

Both run the same code; only streams and host memory differ. The emulated one has no clock of its
own: the engine advances time as the machine profile says, and labels every such number.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from hybrimoe_plugin.cache_folder import cache_dir, usable_triton_cache
from hybrimoe_plugin.compute.gpu.host_bytes import (
    HostBytes,
    PlainBytes,
    RegisteredBytes,
    StagedBytes,
)
from hybrimoe_plugin.compute.gpu.issue import AtOnce, OnThread
from hybrimoe_plugin.compute.gpu.kernels.base import Kernels, SlotCall
from hybrimoe_plugin.compute.gpu.kernels.layout import SlotLayout
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels
from hybrimoe_plugin.compute.gpu.kernels.tuning import Tunable
from hybrimoe_plugin.compute.gpu.lane import AHEAD_DEPTH, LANDINGS, SlotLane, Transfer
from hybrimoe_plugin.device.cuda_timer import cuda_timer
from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.device.streams import Coming, CudaStreams, HostStreams, Streams
from hybrimoe_plugin.errors import BackendError, BudgetError
from hybrimoe_plugin.weights.layer_weights import LayerWeights

log = logging.getLogger(__name__)


class SlotAccelerator:
    """Slots of quantised experts on one device.

    Args:
        kernels: fused Triton kernels or their plain twin; `fallback` serves layers whose types they
            refuse.
        ahead_depth: most prefetches that the device is given at once, at least 1; see
            `AHEAD_DEPTH`.
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
        self._buffer = torch.empty(0, 0, dtype=torch.uint8)
        self._lane = self._make_lane(0)
        self._allocated = False
        self._layers: tuple[LayerWeights, ...] = ()
        """Kept alive, so that no other layer gets the id of one of them."""
        self._known: dict[int, SlotLayout] = {}
        """Layouts by the id of a layer's weights: hashing or making one for every transfer would
        cost as much as it.
        """

    @property
    def cancelled(self) -> int:
        """Prefetches that were superseded before they crossed the link."""
        return self._lane.cancelled

    @property
    def slots(self) -> int:
        return len(self._buffer) if self._allocated else 0

    def allocate(self, slots: int, layers: Sequence[LayerWeights]) -> None:
        """Raises: BackendError: a type has no device dequantisation. BudgetError: the memory is not
        there.
        """
        self._choose_kernels(layers)
        layouts = [self.kernels.layout(weights.spec) for weights in layers]
        self._layers = tuple(layers)
        self._known = {id(weights): layout for weights, layout in zip(layers, layouts, strict=True)}
        size = max(layout.size for layout in layouts)
        landing = max((part.size for layout in layouts for part in layout if part.split), default=0)
        self._drop()  # given back before the new slots are taken
        self._host.prepare(layers)
        try:
            self._buffer = torch.empty(slots, size, dtype=torch.uint8, device=self.device)
            self._lane = self._make_lane(landing)
        except (RuntimeError, MemoryError) as error:  # CUDA out of memory is a RuntimeError
            self._drop()
            raise BudgetError(
                f"{slots} slots of {size} bytes and {LANDINGS} landing buffers of {landing} do "
                f"not fit on "
                f"{self.device}: {error}"
            ) from error
        if self.device.type == "cuda" and isinstance(self.kernels, Tunable):
            with torch.cuda.device(self.device):
                for layout, top_k in {
                    (self.kernels.layout(item.spec), item.spec.top_k) for item in layers
                }:
                    self.kernels.tune(layout, top_k, self._buffer, cuda_timer(self.device))
        self._allocated = True

    def onload(self, slot: int, weights: LayerWeights, expert: int, ahead: bool = False) -> None:
        layout = self._known.get(id(weights)) or self.kernels.layout(weights.spec)
        self._lane.send(Transfer(slot, layout, weights, expert), ahead)

    def cancel(self, slot: int) -> bool:
        return self._lane.cancel(slot)

    def compute(
        self,
        slots: Sequence[int],
        hidden: torch.Tensor,
        slot_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        self._lane.pump()
        # Triton launches on the current device, which is another where a model lies on several.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self._lane.wait_gate_up(slots)
            layout = self._lane.held[slots[0]].layout
            assert all(self._lane.held[slot].layout == layout for slot in slots), (
                "one call computes one layer"
            )
            call = SlotCall(self._buffer, layout, tuple(slots), hidden, slot_ids, topk_weights)
            activations = self.kernels.gate_up(call)
            self._lane.wait_down(slots)
            output = self.kernels.down(call, activations)
            self._lane.used(slots)
        return output

    def bring(self, tensors: Sequence[torch.Tensor]) -> Coming:
        return self.streams.bring(tensors)

    def landing(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.streams.landing(tensor)

    def coming(self, landed: list[torch.Tensor]) -> Coming:
        return self.streams.coming(landed)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.streams.place(tensor)

    def synchronize(self) -> None:
        """The host waits for everything. Raises: BackendError: a transfer has failed."""
        self._lane.drain()
        self.streams.synchronize()
        self._lane.check()

    def settle(self) -> dict[int, tuple[LayerWeights, int]]:
        self._lane.settle()
        return {slot: (held.weights, held.expert) for slot, held in self._lane.held.items()}

    def wrong_slots(self, expected: Mapping[int, tuple[LayerWeights, int]]) -> list[int]:
        self.synchronize()
        return [
            slot
            for slot, (weights, expert) in expected.items()
            if not self._lane.holds(slot, weights, expert)
        ]

    def close(self) -> None:
        self._drop()
        self._host.release()

    def _drop(self) -> None:
        """Give the slots back."""
        self._allocated = False
        self._lane.close()  # before the device is waited for: this gives it the last of its work
        self.streams.synchronize()
        self._buffer = torch.empty(0, 0, dtype=torch.uint8)
        self._lane = self._make_lane(0)

    def _make_lane(self, landing_bytes: int) -> SlotLane:
        """Traffic for the buffer as it is now."""
        issuer = OnThread() if self._host.slow and len(self._buffer) else AtOnce()
        return SlotLane(
            self.streams,
            self.kernels,
            self._host,
            self._buffer,
            landing_bytes,
            self._ahead_depth,
            issuer,
        )

    def _choose_kernels(self, layers: Sequence[LayerWeights]) -> None:
        for weights in layers:
            reason = self.kernels.refusal(weights.spec)
            if reason is not None and self._fallback is not None:
                log.warning(
                    "layer %d: %s; experts on %s use torch operations",
                    weights.layer,
                    reason,
                    self.device,
                )
                self.kernels, self._fallback = self._fallback, None
                reason = self.kernels.refusal(weights.spec)
            if reason is not None:
                raise BackendError(
                    f"layer {weights.layer}: experts cannot be computed on {self.device}: {reason}"
                )


def make_kernels(name: str, device: torch.device) -> tuple[Kernels, Kernels | None]:
    """(kernels, fallback for types they refuse): `auto` takes Triton on CUDA where it is installed.

    Raises:
        BackendError: Triton was asked for and cannot be used.
    """
    on_cuda = device.type == "cuda"
    installed = importlib.util.find_spec("triton") is not None
    if name == "torch" or (name == "auto" and not (on_cuda and installed)):
        return TorchKernels(), None
    if not installed:
        raise BackendError(
            "kernels: triton asked for, but Triton is not installed: pip install triton"
        )
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            "kernels: triton without a CUDA device run only in Triton's interpreter: set "
            "TRITON_INTERPRET=1 before "
            "the program starts (slow, for tests)"
        )
    from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

    if on_cuda:
        usable_triton_cache()
    return TritonKernels(
        device, tuned=_tuned_path(device)
    ), TorchKernels() if name == "auto" else None


def _tuned_path(device: torch.device) -> Path | None:
    """Where tile sizes for this kind of device are kept."""
    if device.type != "cuda":
        return None
    facts = f"{torch.cuda.get_device_name(device)} triton {importlib.metadata.version('triton')}"
    return cache_dir() / "kernels" / f"{hashlib.sha256(facts.encode()).hexdigest()[:20]}.json"


def make_accelerator(
    name: str, device: torch.device, kernels: str = "auto", ahead_depth: int = AHEAD_DEPTH
) -> SlotAccelerator | None:
    """`none`, `emulated` or `cuda`; `kernels` is `auto`, `triton` or `torch`; `ahead_depth` as in
    `SlotAccelerator`.

    Raises:
        BackendError: the device or the kernels cannot be used, with the reason.
    """
    if name == "none":
        return None
    if name == "emulated":
        device = torch.device("cpu")
        chosen, fallback = make_kernels(kernels, device)
        return SlotAccelerator(
            device, "emulated", chosen, fallback=fallback, ahead_depth=ahead_depth
        )
    reason = cuda_refusal()
    if reason is not None:
        raise BackendError(f"accelerator {name} on {device}: {reason}")
    chosen, fallback = make_kernels(kernels, device)
    streams = CudaStreams(device)
    host = RegisteredBytes(device, StagedBytes(streams, slow=True))
    return SlotAccelerator(device, "cuda", chosen, streams, host, fallback, ahead_depth)
