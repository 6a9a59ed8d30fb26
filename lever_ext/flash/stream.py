"""Decoder layers in the order of execution: the first ones resident, the others read ahead into a
ring of buffers.

After the last layer the ring goes on with the first streamed layer of the next pass, so the device
reads while the draft works.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple

import torch

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
        elsewhere: of the resident ones, how many first layers somebody else keeps.

    Raises:
        FlashError: a resident layer cannot be read.
    """

    def __init__(self, pack: FlashPack, resident: int, ring: int, elsewhere: int = 0) -> None:
        self.pack = pack
        self.layers = pack.blocks("layer")
        self.first = resident
        streamed = self.layers[resident:]
        if streamed and ring < 2:
            raise ValueError(f"{len(streamed)} streamed layers need 2 buffers, not {ring}")
        self._kept = {layer: pack.read(self.layers[layer]) for layer in range(elsewhere, resident)}
        self.resident: list[Tensors] = [
            tensors_in(self.layers[layer], self._kept[layer]) if layer in self._kept else {}
            for layer in range(resident)
        ]
        self.wait_us = 0.0
        """Time that `acquire` stood still for reads, since the start."""
        count = min(ring, len(streamed))
        self._buffers = Buffer.several(count, block_memory(streamed))
        self._views: dict[tuple[int, int], Tensors] = {}
        self._ahead: deque[_Ahead] = deque()
        self._free: list[int] = list(range(count))
        self._held: _Ahead | None = None
        self._next = resident

    @property
    def buffers(self) -> list[Buffer]:
        """All memory that holds layers."""
        return [*self._kept.values(), *self._buffers]

    @property
    def upcoming(self) -> int:
        """The streamed layer that `acquire` gives next."""
        return self._ahead[0].layer if self._ahead else self._next

    @property
    def arrived(self) -> bool:
        """Whether `acquire` would give the upcoming layer at once."""
        return bool(self._ahead) and self._ahead[0].arrival.done()

    @property
    def starved(self) -> bool:
        """Whether all buffers are lent, so that nothing is read."""
        return not self._ahead and not self._free

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
            (buffer number, or -1 for a resident layer; parameter name -> view). Valid until
            `release`.

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
            self.pack.arrive(self.layers[layer], self._buffers[ahead.slot], ahead.arrival)
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

    def lend(self) -> int:
        """Take the acquired layer's buffer out of the ring until `give_back`; others can be
        acquired then. Mutates.
        """
        assert self._held is not None
        lent, self._held = self._held.slot, None
        return lent

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
