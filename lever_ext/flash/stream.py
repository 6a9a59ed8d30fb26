"""Decoder layers in the order of execution: the first ones resident, the others read ahead.

Streamed layers pass through a ring of buffers. After the last layer the ring goes on with the first
streamed layer of the next pass, so the device reads while the draft works. With layer 0 resident
and layers 1 to 3 in a ring of two buffers:

    computing    0  |  1  |  2  |  3  |     draft     |  0  |  1  |  2  | ...
    buffer A       1 read |  3 read   |    2 read           |
    buffer B              2 read |  1 read (next pass)      |  3 read   | ...
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import torch

from hybrimoe_plugin.errors import FlashError
from lever_ext.flash.format import Block
from lever_ext.flash.pack import FlashPack, Tensors, block_memory, tensors_in
from lever_ext.flash.reader import Buffer


class WeightStream(Protocol):
    """Hands out the weights of decoder layers, one layer at a time."""

    def acquire(self, layer: int) -> tuple[int, Tensors]:
        """(a number for this memory, parameter name -> tensor). Valid until `release`."""
        ...

    def release(self, layer: int) -> None:
        """Give a layer's memory to the next read. Mutates."""
        ...


class _Reading(NamedTuple):
    """A streamed layer that is in a buffer or on its way there."""

    layer: int
    slot: int
    arrival: Future[None]


class LayerStream:
    """Hands out layers from DRAM and flash.

    Args:
        pack: the target.
        resident: how many first layers stay in memory.
        ring: buffers for the others, at least 2 where there are any.
        elsewhere: of the resident ones, how many first layers an accelerator keeps.

    Raises:
        FlashError: a resident layer cannot be read.
    """

    def __init__(
        self,
        pack: FlashPack,
        resident: int,
        ring: int,
        elsewhere: int = 0,
    ) -> None:
        self.pack = pack
        self.layers = pack.blocks("layer")
        self.first = resident
        """The first streamed layer."""
        streamed = self.layers[resident:]
        if streamed and ring < 2:
            raise ValueError(f"{len(streamed)} streamed layers need 2 buffers, not {ring}")
        self._kept: dict[int, Buffer] = {}
        self.resident: list[Tensors] = [{} for _ in range(resident)]
        """Weights of the resident layers; empty for those kept elsewhere."""
        for layer in range(elsewhere, resident):
            self._kept[layer] = pack.read(self.layers[layer])
            self.resident[layer] = tensors_in(self.layers[layer], self._kept[layer])
        self.wait_us = 0.0
        """Time that `acquire` stood still for reads, since the start."""
        count = min(ring, len(streamed))
        self._buffers = Buffer.several(count, block_memory(streamed))
        self._views: dict[tuple[int, int], Tensors] = {}
        """(layer, slot) -> its tensors as views."""
        self._queue: deque[_Reading] = deque()
        """Layers read ahead, in the order of execution."""
        self._free: list[int] = list(range(count))
        self._held: _Reading | None = None
        """The layer that is acquired."""
        self._next = resident
        """The streamed layer that is read next."""

    @property
    def buffers(self) -> list[Buffer]:
        """All memory that holds layers."""
        return [*self._kept.values(), *self._buffers]

    @property
    def upcoming(self) -> int:
        """The streamed layer that `acquire` gives next."""
        return self._queue[0].layer if self._queue else self._next

    @property
    def arrived(self) -> bool:
        """Whether `acquire` would give the upcoming layer at once."""
        return bool(self._queue) and self._queue[0].arrival.done()

    @property
    def starved(self) -> bool:
        """Whether all buffers are lent, so that nothing is read."""
        return not self._queue and not self._free

    def start(self) -> None:
        """Read ahead as far as buffers are free. Mutates."""
        while self._free and self.first < len(self.layers):
            slot = self._free.pop()
            layer = self._next
            arrival = self.pack.submit(self.layers[layer], self._buffers[slot])
            self._queue.append(_Reading(layer, slot, arrival))
            is_last = layer + 1 == len(self.layers)
            self._next = self.first if is_last else layer + 1

    def acquire(self, layer: int) -> tuple[int, Tensors]:
        """Wait for a layer's weights.

        Returns:
            (buffer number, or -1 for a resident layer; parameter name -> view). Valid until
            `release`.

        Raises:
            FlashError: the layer cannot be read; the next pass may try again.
        """
        if layer < self.first:
            return -1, self.resident[layer]
        if self._held is not None or (self._queue and self._queue[0].layer != layer):
            # The last pass was cut off in its middle.
            self.reset(layer)
        self.start()
        reading = self._queue.popleft()
        self._held = reading
        block = self.layers[layer]
        buffer = self._buffers[reading.slot]
        begin = time.perf_counter()
        try:
            self.pack.arrive(block, buffer, reading.arrival)
            self.pack.check(block, buffer)
        except FlashError:
            self.reset(self.first)
            raise
        self.wait_us += (time.perf_counter() - begin) * 1e6
        return reading.slot, self._tensors(block, reading)

    def release(self, layer: int) -> None:
        """Give a layer's buffer to the next read. Mutates."""
        if layer >= self.first and self._held is not None:
            self._free.append(self._held.slot)
            self._held = None
            self.start()

    def lend(self) -> int:
        """Take the acquired layer's buffer out of the ring until `give_back`; its slot.

        Other layers can be acquired meanwhile. Mutates.
        """
        assert self._held is not None
        slot = self._held.slot
        self._held = None
        return slot

    def give_back(self, slot: int) -> None:
        """Read into a lent buffer again. Mutates."""
        self._free.append(slot)
        self.start()

    def memory(self, layer: int, slot: int) -> torch.Tensor:
        """The bytes of a layer's block, in a ring buffer or resident."""
        buffer = self._kept[layer] if layer < self.first else self._buffers[slot]
        return buffer.bytes[: self.layers[layer].nbytes]

    def reset(self, layer: int) -> None:
        """Forget what was read ahead and go on with `layer`. Mutates."""
        unfinished = list(self._queue)
        if self._held is not None:
            unfinished.append(self._held)
        for reading in unfinished:
            # Waits: a buffer must not be read into twice at once.
            reading.arrival.exception()
        self._queue.clear()
        self._held = None
        self._free = list(range(len(self._buffers)))
        self._next = max(layer, self.first)

    def _tensors(self, block: Block, reading: _Reading) -> Tensors:
        key = (reading.layer, reading.slot)
        if key not in self._views:
            self._views[key] = tensors_in(block, self._buffers[reading.slot])
        return self._views[key]
