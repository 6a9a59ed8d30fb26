"""Decoder layers in the order of execution: the first ones resident, the others read ahead into a ring of buffers.

After the last layer the ring goes on with the first streamed layer of the next pass, so the device reads while the
draft works.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple

from hybrimoe_plugin.errors import FlashError
from lever_ext.flash.format import Block
from lever_ext.flash.pack import FlashPack, Tensors, block_memory, tensors_in
from lever_ext.flash.reader import Buffer


class _Ahead(NamedTuple):
    """A streamed layer that is here or on its way."""

    layer: int
    slot: int
    arrival: Future[None]


class LayerStream:
    """Hands out layers one at a time.

    Args:
        pack: the target.
        resident: how many first layers stay in memory.
        ring: buffers for the others, at least 2 where there are any.

    Raises:
        FlashError: a resident layer cannot be read.
    """

    def __init__(self, pack: FlashPack, resident: int, ring: int) -> None:
        self.pack = pack
        self.layers = pack.blocks("layer")
        self.first = resident
        streamed = self.layers[resident:]
        if streamed and ring < 2:
            raise ValueError(f"{len(streamed)} streamed layers need 2 buffers, not {ring}")
        self.resident = [pack.load(block) for block in self.layers[:resident]]
        self.wait_us = 0.0
        """Time that `acquire` stood still for reads, since the start."""
        count = min(ring, len(streamed))
        self._buffers = [Buffer(block_memory(streamed)) for _ in range(count)]
        self._views: dict[tuple[int, int], Tensors] = {}
        self._ahead: deque[_Ahead] = deque()
        self._free: list[int] = list(range(count))
        self._held: _Ahead | None = None
        self._next = resident

    @property
    def buffer_bytes(self) -> int:
        return sum(len(buffer.memory) for buffer in self._buffers)

    def start(self) -> None:
        """Read ahead as far as buffers are free. Mutates."""
        while self._free and self.first < len(self.layers):
            slot = self._free.pop()
            arrival = self.pack.submit(self.layers[self._next], self._buffers[slot])
            self._ahead.append(_Ahead(self._next, slot, arrival))
            self._next = self._next + 1 if self._next + 1 < len(self.layers) else self.first

    def acquire(self, layer: int) -> tuple[int, Tensors]:
        """Wait for a layer's weights.

        Returns:
            (buffer number, or -1 for a resident layer; parameter name -> view). Valid until `release`.

        Raises:
            FlashError: the layer cannot be read; the next pass may try again.
        """
        if layer < self.first:
            return -1, self.resident[layer]
        if self._held is not None or (self._ahead and self._ahead[0].layer != layer):
            # The last pass was cut off in its middle.
            self.reset(layer)
        self.start()
        ahead = self._ahead.popleft()
        self._held = ahead
        begin = time.perf_counter()
        try:
            ahead.arrival.result()
            self.pack.check(self.layers[layer], self._buffers[ahead.slot])
        except FlashError:
            self.reset(self.first)
            raise
        self.wait_us += (time.perf_counter() - begin) * 1e6
        return ahead.slot, self._tensors(self.layers[layer], ahead)

    def release(self, layer: int) -> None:
        """Give a layer's buffer to the next read. Mutates."""
        if layer >= self.first and self._held is not None:
            self._free.append(self._held.slot)
            self._held = None
            self.start()

    def reset(self, layer: int) -> None:
        """Forget what was read ahead and go on with `layer`. Mutates."""
        for ahead in self._ahead:
            ahead.arrival.exception()  # a buffer must not be read into twice at once
        if self._held is not None:
            self._held.arrival.exception()
        self._ahead.clear()
        self._held = None
        self._free = list(range(len(self._buffers)))
        self._next = max(layer, self.first)

    def _tensors(self, block: Block, ahead: _Ahead) -> Tensors:
        key = (ahead.layer, ahead.slot)
        if key not in self._views:
            self._views[key] = tensors_in(block, self._buffers[ahead.slot])
        return self._views[key]
