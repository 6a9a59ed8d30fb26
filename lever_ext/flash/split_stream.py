"""Layers of a target that an accelerator computes in part: the same calls as `LayerStream`, weights
where they belong.

A layer that is copied goes from its pinned buffer to the accelerator on the link's own queue as
soon as it has arrived and a buffer is free there, while the layers before it compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hybrimoe_plugin.device.streams import COMPUTE, LINK, Event
from hybrimoe_plugin.errors import FlashError
from lever_ext.flash.accelerator import Accelerator
from lever_ext.flash.pack import FlashPack, Tensors, block_memory, views
from lever_ext.flash.split import Place
from lever_ext.flash.stream import LayerStream

ROUTER = ".mlp.gate.weight"


class _Copied(NamedTuple):
    """A layer that is on the accelerator or on its way there."""

    layer: int
    slot: int
    there: Event


class _Lent(NamedTuple):
    """A host buffer that a copy may still read from."""

    slot: int
    copied: Event


class SplitStream:
    """Hands out layers one at a time, on the CPU or on the accelerator.

    Args:
        inner: reads the layers that do not live on the accelerator.
        accelerator: computes the others; on its memory are `ring` buffers and the layers that stay.
        places: of every layer; those that stay come first.
        ring: accelerator buffers that copied layers pass through, at least 2.

    Raises:
        FlashError: a layer that stays cannot be read.
    """

    def __init__(
        self, inner: LayerStream, accelerator: Accelerator, places: Sequence[Place], ring: int
    ) -> None:
        self.inner = inner
        self.places = tuple(places)
        self.device = accelerator.device
        self._streams = accelerator.streams
        if accelerator.pins is not None:
            accelerator.pins.add(inner.buffers)
        self._staying = [
            to_device(inner.pack, layer, self.device)
            for layer, place in enumerate(places)
            if place is Place.STAYS
        ]
        copied = [
            block
            for block, place in zip(inner.layers, places, strict=True)
            if place is Place.COPIED
        ]
        count = min(max(2, ring), len(copied))
        self._buffers = [
            torch.empty(block_memory(copied), dtype=torch.uint8, device=self.device)
            for _ in range(count)
        ]
        self._free: deque[tuple[int, Event]] = deque(
            (slot, self._streams.record(COMPUTE)) for slot in range(count)
        )
        self._views: dict[tuple[int, int], Tensors] = {}
        self._ahead: deque[_Copied] = deque()
        self._lent: deque[_Lent] = deque()
        self._held = -1
        """Buffer of the layer that is acquired, on its side."""
        self._next = 0

    @property
    def wait_us(self) -> float:
        """Time that `acquire` stood still for reads, since the start."""
        return self.inner.wait_us

    @property
    def resident(self) -> list[Tensors]:
        """On the CPU: all of the layers in DRAM, the routers of those that live on the
        accelerator.
        """
        routers = [
            {name: tensor.cpu() for name, tensor in tensors.items() if name.endswith(ROUTER)}
            for tensors in self._staying
        ]
        return [*routers, *self.inner.resident[len(routers) :]]

    def on_device(self, layer: int) -> bool:
        """Whether the accelerator computes this layer."""
        return self.places[layer] is not Place.CPU

    def start(self) -> None:
        """Read and copy ahead as far as buffers are free. Mutates."""
        self.inner.start()
        self._copy_ahead()

    def acquire(self, layer: int) -> tuple[int, Tensors]:
        """Wait for a layer's weights; computing on the accelerator waits there, not the host.

        Returns:
            (a number for this memory; parameter name -> view on the layer's side). Valid until
            `release`.

        Raises:
            FlashError: the layer cannot be read; the next pass may try again.
        """
        place = self.places[layer]
        if place is Place.STAYS:
            return -1, self._staying[layer]
        if place is Place.CPU:
            return self._on_cpu(layer)
        if self._ahead and self._ahead[0].layer != layer:
            self.reset(layer)  # the last pass was cut off in its middle
        if not self._ahead:
            self._next = layer
            self._copy(layer)
        copied = self._ahead.popleft()
        self._held = copied.slot
        self._streams.wait(COMPUTE, copied.there)
        self._copy_ahead()
        key = (layer, copied.slot)
        if key not in self._views:
            self._views[key] = views(self.inner.layers[layer], self._buffers[copied.slot])
        return len(self.inner.buffers) + copied.slot, self._views[key]

    def release(self, layer: int) -> None:
        """Give a layer's buffer to the next read or copy. Mutates."""
        place, held, self._held = self.places[layer], self._held, -1
        if held >= 0 and place is Place.COPIED:
            self._free.append((held, self._streams.record(COMPUTE)))
        elif held >= 0:
            self.inner.give_back(held)
        self._copy_ahead()

    def reset(self, layer: int) -> None:
        """Forget what was read and copied ahead and go on with `layer`. Mutates."""
        self._streams.synchronize()
        self._free = deque(
            (slot, self._streams.record(COMPUTE)) for slot in range(len(self._buffers))
        )
        self._ahead.clear()
        self._lent.clear()
        self._held = -1
        self._next = layer
        self.inner.reset(layer)

    def _on_cpu(self, layer: int) -> tuple[int, Tensors]:
        if layer >= self.inner.first:
            if self._ahead or self.inner.upcoming != layer:
                self.reset(layer)
            self._take_back(needed=self.inner.starved)
        slot, tensors = self._acquire(layer)
        if layer >= self.inner.first:
            self._held = (
                self.inner.lend()
            )  # so that what comes after it can be copied while it computes
            self._next = layer + 1
            self._copy_ahead()
        return slot, tensors

    def _copy_ahead(self) -> None:
        """Start the copies that need not wait for anything."""
        self._take_back(needed=False)
        for _ in self.places:
            layer = self._next = self._next % len(self.places)
            place, streamed = self.places[layer], layer >= self.inner.first
            if place is Place.COPIED:
                here = not streamed or (self.inner.upcoming == layer and self.inner.arrived)
                if not self._free or not here:
                    return
                self._copy(layer)
            elif place is Place.CPU and streamed:
                return  # the host takes it itself
            else:
                self._next += 1

    def _copy(self, layer: int) -> None:
        """Send a layer once it has arrived; the host waits for the arrival only."""
        slot, streamed = -1, layer >= self.inner.first
        if streamed:
            if self.inner.upcoming != layer:
                self.reset(layer)
            self._take_back(needed=self.inner.starved)
            self._acquire(layer)
            slot = self.inner.lend()
        target, computed = self._free.popleft()
        source = self.inner.memory(layer, slot)
        self._streams.wait(LINK, computed)
        self._streams.enqueue(LINK, lambda: _send(source, self._buffers[target]))
        there = self._streams.record(LINK)
        self._ahead.append(_Copied(layer, target, there))
        if streamed:
            self._lent.append(_Lent(slot, there))
        self._next = layer + 1

    def _acquire(self, layer: int) -> tuple[int, Tensors]:
        try:
            return self.inner.acquire(layer)
        except FlashError:
            self.reset(0)  # copies may still read from buffers that the next pass fills
            raise

    def _take_back(self, needed: bool) -> None:
        """Read into host buffers again that were copied away; the host waits for one if it is
        needed.
        """
        while self._lent and (needed or self._streams.reached(self._lent[0].copied)):
            lent = self._lent.popleft()
            if needed:
                self._streams.block(lent.copied)
            needed = False
            self.inner.give_back(lent.slot)


def to_device(pack: FlashPack, layer: int, device: torch.device) -> Tensors:
    """A layer's weights in accelerator memory; the DRAM that they pass through is free again.

    Raises:
        FlashError: it cannot be read.
    """
    block = pack.blocks("layer")[layer]
    memory = torch.empty(block.nbytes, dtype=torch.uint8, device=device)
    memory.copy_(pack.read(block).bytes[: block.nbytes])
    return views(block, memory)


def _send(source: torch.Tensor, target: torch.Tensor) -> None:
    target[: source.numel()].copy_(source, non_blocking=True)
