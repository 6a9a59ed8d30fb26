"""Layers of a target of which an accelerator computes a part: `LayerStream` with copies behind it.

A layer that is copied goes from its pinned buffer to the accelerator on the link's own queue as
soon as it has arrived and a buffer is free there, while the layers before it compute. Three layers,
0 and 2 copied, 1 on the CPU:

    host buffers      0 arrives | 1 arrives      | 2 arrives
    link queue                  | copy 0         |           | copy 2
    compute queue                        | GPU 0 |                   | GPU 2
    host                                         | CPU 1     |

    copy 0 waits for its arrival (the host waits) and for a free device buffer (the link waits)
    GPU 0  waits for copy 0 (the compute queue waits)
    host buffer 0 is read into again once copy 0 has ended
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hybrimoe_plugin.device.streams import COMPUTE, LINK, Event
from hybrimoe_plugin.errors import FlashError
from lever_ext.flash.pack import FlashPack, Tensors, block_memory, views
from lever_ext.flash.stream import LayerStream
from lever_ext.placement.device import TargetDevice
from lever_ext.placement.split import Place

ROUTER = ".mlp.gate.weight"


class _Copied(NamedTuple):
    """A layer that is on the accelerator or on its way there."""

    layer: int
    slot: int
    """Device buffer."""
    there: Event


class _Lent(NamedTuple):
    """A host buffer that a copy may still read from."""

    slot: int
    copied: Event


class SplitStream:
    """Hands out layers one at a time, on the CPU or on the accelerator.

    Args:
        inner: reads the layers that do not live on the accelerator.
        accelerator: computes the others; in its memory are `ring` buffers and the layers that stay.
        places: of every layer; those that stay come first.
        ring: accelerator buffers that copied layers pass through, at least 2.

    Raises:
        FlashError: a layer that stays cannot be read.
    """

    def __init__(
        self,
        inner: LayerStream,
        accelerator: TargetDevice,
        places: Sequence[Place],
        ring: int,
    ) -> None:
        self.inner = inner
        self.places = tuple(places)
        self.device = accelerator.device
        self._streams = accelerator.streams
        if accelerator.pins is not None:
            accelerator.pins.add(inner.buffers)
        self._staying: list[Tensors] = []
        copied = []
        for layer, place in enumerate(places):
            if place is Place.STAYS:
                self._staying.append(to_device(inner.pack, layer, self.device))
            elif place is Place.COPIED:
                copied.append(inner.layers[layer])
        size = block_memory(copied)
        self._buffers: list[torch.Tensor] = []
        """Of the accelerator."""
        for _ in range(min(max(2, ring), len(copied))):
            self._buffers.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        self._free = self._all_free()
        """(device buffer, when it was computed with for the last time)."""
        self._views: dict[tuple[int, int], Tensors] = {}
        """(layer, device buffer) -> its tensors as views."""
        self._queue: deque[_Copied] = deque()
        """Layers copied ahead, in the order of execution."""
        self._lent: deque[_Lent] = deque()
        self._held = -1
        """Buffer of the layer that is acquired, on its side."""
        self._next = 0
        """The layer that is copied next."""

    @property
    def wait_us(self) -> float:
        """Time that `acquire` stood still for reads, since the start."""
        return self.inner.wait_us

    @property
    def resident(self) -> list[Tensors]:
        """Weights on the CPU of the resident layers; of those on the accelerator, the routers."""
        routers = []
        for tensors in self._staying:
            names = [name for name in tensors if name.endswith(ROUTER)]
            routers.append({name: tensors[name].cpu() for name in names})
        return [*routers, *self.inner.resident[len(routers) :]]

    def on_device(self, layer: int) -> bool:
        """Whether the accelerator computes this layer."""
        return self.places[layer] is not Place.CPU

    def start(self) -> None:
        """Read and copy ahead as far as buffers are free. Mutates."""
        self.inner.start()
        self._copy_ahead()

    def acquire(self, layer: int) -> tuple[int, Tensors]:
        """Wait for a layer's weights.

        Where the accelerator computes the layer, its compute queue waits for them, not the host.

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
            return self._acquire_on_cpu(layer)
        if self._queue and self._queue[0].layer != layer:
            # The last pass was cut off in its middle.
            self.reset(layer)
        if not self._queue:
            self._next = layer
            self._copy(layer)
        copied = self._queue.popleft()
        self._held = copied.slot
        self._streams.wait(COMPUTE, copied.there)
        self._copy_ahead()
        key = (layer, copied.slot)
        if key not in self._views:
            self._views[key] = views(self.inner.layers[layer], self._buffers[copied.slot])
        return len(self.inner.buffers) + copied.slot, self._views[key]

    def release(self, layer: int) -> None:
        """Give a layer's buffer to the next read or copy. Mutates."""
        held = self._held
        self._held = -1
        if held >= 0 and self.places[layer] is Place.COPIED:
            self._free.append((held, self._streams.record(COMPUTE)))
        elif held >= 0:
            self.inner.give_back(held)
        self._copy_ahead()

    def reset(self, layer: int) -> None:
        """Forget what was read and copied ahead and go on with `layer`. Mutates."""
        self._streams.synchronize()
        self._free = self._all_free()
        self._queue.clear()
        self._lent.clear()
        self._held = -1
        self._next = layer
        self.inner.reset(layer)

    def _all_free(self) -> deque[tuple[int, Event]]:
        return deque((slot, self._streams.record(COMPUTE)) for slot in range(len(self._buffers)))

    def _acquire_on_cpu(self, layer: int) -> tuple[int, Tensors]:
        streamed = layer >= self.inner.first
        if streamed:
            if self._queue or self.inner.upcoming != layer:
                self.reset(layer)
            self._take_back(needed=self.inner.starved)
        slot, tensors = self._acquire_inner(layer)
        if streamed:
            # Lent, so that the layers after it can be copied while it computes.
            self._held = self.inner.lend()
            self._next = layer + 1
            self._copy_ahead()
        return slot, tensors

    def _copy_ahead(self) -> None:
        """Start the copies that need not wait for anything."""
        self._take_back(needed=False)
        for _ in self.places:
            layer = self._next = self._next % len(self.places)
            streamed = layer >= self.inner.first
            if self.places[layer] is Place.COPIED:
                here = not streamed or (self.inner.upcoming == layer and self.inner.arrived)
                if not self._free or not here:
                    return
                self._copy(layer)
            elif self.places[layer] is Place.CPU and streamed:
                # The host takes it from the inner stream itself.
                return
            else:
                self._next += 1

    def _copy(self, layer: int) -> None:
        """Send a layer once it has arrived; the host waits for the arrival only."""
        host_slot = -1
        streamed = layer >= self.inner.first
        if streamed:
            if self.inner.upcoming != layer:
                self.reset(layer)
            self._take_back(needed=self.inner.starved)
            self._acquire_inner(layer)
            host_slot = self.inner.lend()
        slot, computed = self._free.popleft()
        source = self.inner.memory(layer, host_slot)
        self._streams.wait(LINK, computed)
        self._streams.enqueue(LINK, lambda: _send(source, self._buffers[slot]))
        there = self._streams.record(LINK)
        self._queue.append(_Copied(layer, slot, there))
        if streamed:
            self._lent.append(_Lent(host_slot, there))
        self._next = layer + 1

    def _acquire_inner(self, layer: int) -> tuple[int, Tensors]:
        try:
            return self.inner.acquire(layer)
        except FlashError:
            # Copies may still read from buffers that the next pass fills.
            self.reset(0)
            raise

    def _take_back(self, needed: bool) -> None:
        """Let host buffers that were copied away be read into again.

        Args:
            needed: wait until one is, whatever else is free.
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
