"""An accelerator whose slots hold quantised experts: CUDA with its own transfer stream, or emulated on the CPU.

Both run the same code; only the lane that carries the transfers differs. The emulated one has no clock of its own: the
engine advances time as the machine profile says, and labels every such number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.errors import BackendError, BudgetError
from hybrimoe_plugin.experts.cpu_torch import add_expert, expert_forward
from hybrimoe_plugin.experts.dequant import dequantize, supported
from hybrimoe_plugin.experts.weights import Bytes, LayerWeights

_DENSE_TOKENS = 16
"""Up to here every token goes through an expert and the others' weight is 0: choosing rows would stop the device."""


class Lane(Protocol):
    """How bytes get into a slot and who waits for whom."""

    def prepare(self, layers: Sequence[LayerWeights]) -> None: ...

    def copy(self, slot: int, target: torch.Tensor, parts: Sequence[Bytes]) -> None:
        """Fill `target` with the parts one after another, after the slot's last use."""
        ...

    def wait(self, slot: int) -> None:
        """The compute stream goes on only when the slot has arrived."""
        ...

    def used(self, slot: int) -> None:
        """Everything queued for compute so far is the slot's last use."""
        ...

    def synchronize(self) -> None: ...


class HostLane:
    """Plain copies: the emulated link."""

    def prepare(self, layers: Sequence[LayerWeights]) -> None:
        """Nothing to pin."""

    def copy(self, slot: int, target: torch.Tensor, parts: Sequence[Bytes]) -> None:
        view, start = target.numpy(), 0
        for part in parts:
            view[start : start + part.size] = part
            start += part.size

    def wait(self, slot: int) -> None:
        """A plain copy is complete when it returns."""

    def used(self, slot: int) -> None:
        """Nothing runs on."""

    def synchronize(self) -> None:
        """Nothing runs on."""


class CudaLane:
    """Asynchronous copies from pinned memory on a stream of their own.

    The mapped file's pages are registered with CUDA where the driver allows it, so that the one host copy serves the
    CPU kernels and the link. Where it does not, bytes go through a ring of pinned buffers.
    """

    RING = 4

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._last_use: dict[int, torch.cuda.Event] = {}
        self._registered: list[tuple[int, int]] = []
        self._ring: list[torch.Tensor] = []
        self._ring_free: list[torch.cuda.Event | None] = [None] * self.RING
        self._turn = 0

    def prepare(self, layers: Sequence[LayerWeights]) -> None:
        runtime = torch.cuda.cudart()
        for matrix in (matrix for weights in layers for matrix in weights.matrices()):
            for block in [matrix.stacked] if matrix.stacked is not None else matrix.experts:
                start = block.ctypes.data & ~4095
                size = -(-(block.ctypes.data + block.size - start) // 4096) * 4096
                # 8: cudaHostRegisterReadOnly, which a read-only file mapping needs.
                if int(runtime.cudaHostRegister(start, size, 8)) == 0:
                    self._registered.append((start, start + size))
        if not self._registered:
            size = max(weights.spec.expert_bytes for weights in layers)
            self._ring = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(self.RING)]

    def copy(self, slot: int, target: torch.Tensor, parts: Sequence[Bytes]) -> None:
        last_use = self._last_use.pop(slot, None)
        if last_use is not None:
            self._stream.wait_event(last_use)  # edge: last compute on this slot -> its next transfer
        if self._ring:
            parts = [self._stage(parts).numpy()]
        with torch.cuda.stream(self._stream):
            start = 0
            for part in parts:
                source = _as_tensor(part)
                target[start : start + part.size].copy_(source, non_blocking=True)
                start += part.size
            event = torch.cuda.Event()
            event.record(self._stream)
        self._arrived[slot] = event
        if self._ring:
            self._ring_free[(self._turn - 1) % self.RING] = event

    def wait(self, slot: int) -> None:
        event = self._arrived.get(slot)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)  # edge: transfer -> compute

    def used(self, slot: int) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._last_use[slot] = event

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def release(self) -> None:
        """Unregister what `prepare` registered."""
        self.synchronize()
        runtime = torch.cuda.cudart()
        for start, _ in self._registered:
            runtime.cudaHostUnregister(start)
        self._registered.clear()

    def _stage(self, parts: Sequence[Bytes]) -> torch.Tensor:
        """Copy into the next pinned buffer, once its last transfer is over."""
        turn = self._turn % self.RING
        self._turn += 1
        free = self._ring_free[turn]
        if free is not None:
            free.synchronize()
        buffer, start = self._ring[turn], 0
        for part in parts:
            buffer.numpy()[start : start + part.size] = part
            start += part.size
        return buffer[:start]


def _as_tensor(part: Bytes) -> torch.Tensor:
    """A tensor over bytes that may lie in a read-only mapping; it is only ever read."""
    writable = np.lib.stride_tricks.as_strided(part, writeable=part.flags.writeable)
    return torch.frombuffer(memoryview(writable), dtype=torch.uint8)


class SlotAccelerator:
    """Slots of quantised experts on one device; kernels are torch operations (the plain twin of fused ones)."""

    def __init__(self, device: torch.device, lane: Lane, name: str) -> None:
        self.name = name
        self.device = device
        self._lane = lane
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._slot_bytes = 0
        self._specs: dict[int, ExpertSpec] = {}

    def allocate(self, slots: int, layers: Sequence[LayerWeights]) -> None:
        """Raises: BackendError: a type has no device dequantisation. BudgetError: the memory is not there."""
        for weights in layers:
            for matrix in weights.matrices():
                if matrix.type_name not in supported():
                    raise BackendError(
                        f"layer {weights.layer}: experts of GGML type {matrix.type_name} cannot be computed on "
                        f"{self.device}; possible are {', '.join(supported())}. Use accelerator: none"
                    )
        self._slot_bytes = max(weights.spec.expert_bytes for weights in layers)
        try:
            self._buffer = torch.empty(slots, self._slot_bytes, dtype=torch.uint8, device=self.device)
        except (RuntimeError, MemoryError) as error:  # CUDA out of memory is a RuntimeError
            raise BudgetError(
                f"{slots} slots of {self._slot_bytes} bytes do not fit on {self.device}: {error}"
            ) from error
        self._lane.prepare(layers)

    def onload(self, slot: int, weights: LayerWeights, expert: int) -> None:
        self._lane.copy(slot, self._buffer[slot], [matrix.experts[expert] for matrix in weights.matrices()])
        self._specs[slot] = weights.spec

    def compute(
        self, slots: Sequence[int], hidden: torch.Tensor, slot_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for slot in slots:
            self._lane.wait(slot)
            expert = self._dequantized(slot, hidden.dtype)
            chosen = slot_ids == slot
            if len(hidden) <= _DENSE_TOKENS:
                weight = (topk_weights * chosen).sum(dim=1, keepdim=True).to(hidden.dtype)
                output += expert_forward(hidden, expert) * weight
            else:
                add_expert(output, hidden, chosen, topk_weights, expert)
            self._lane.used(slot)
        return output

    def synchronize(self) -> None:
        self._lane.synchronize()

    def close(self) -> None:
        if isinstance(self._lane, CudaLane):
            self._lane.release()
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._specs.clear()

    def _dequantized(self, slot: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if slot not in self._specs:
            raise BackendError(f"slot {slot} was never onloaded")
        spec = self._specs[slot]
        inner, outer = (spec.intermediate, spec.hidden), (spec.hidden, spec.intermediate)
        row, up_end = self._buffer[slot], spec.gate_bytes + spec.up_bytes
        gate = dequantize(row[: spec.gate_bytes], spec.gate_type, inner)
        up = dequantize(row[spec.gate_bytes : up_end], spec.up_type, inner)
        down = dequantize(row[up_end : spec.expert_bytes], spec.down_type, outer)
        return gate.to(dtype), up.to(dtype), down.to(dtype)


def cuda_refusal() -> str | None:
    """Why CUDA cannot be used here, None if it can."""
    if not torch.backends.cuda.is_built():
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def make_accelerator(name: str, device: torch.device) -> SlotAccelerator | None:
    """`none`, `emulated` or `cuda`.

    Raises:
        BackendError: the device cannot be used, with the reason.
    """
    if name == "none":
        return None
    if name == "emulated":
        return SlotAccelerator(torch.device("cpu"), HostLane(), "emulated")
    reason = cuda_refusal()
    if reason is not None:
        raise BackendError(f"accelerator {name} on {device}: {reason}")
    return SlotAccelerator(device, CudaLane(device), "cuda")
