"""Buffers that routed experts are read into, and the reads on their way."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass

from lever_ext.flash.format import Block
from lever_ext.flash.pack import FlashPack, Tensors, block_memory, tensors_in
from lever_ext.flash.reader import Buffer


@dataclass
class ExpertCounters:
    """Counts since the start."""

    hits: int = 0
    """Experts that a call found cached."""
    reads: int = 0
    """Experts read, prefetches included."""
    nbytes: int = 0
    prefetches: int = 0
    """Experts read before their layer's router had chosen."""
    prefetches_used: int = 0
    wait_us: float = 0.0
    """Time that computing stood still for reads."""


@dataclass
class ExpertRead:
    """An expert on its way into a slot."""

    layer: int
    """Position among the MoE layers."""
    expert: int
    slot: int
    arrival: Future[None] | None = None
    """None until the read is submitted."""

    def settle(self) -> None:
        """Wait until nothing arrives in the slot any more, whatever became of the read."""
        if self.arrival is not None:
            self.arrival.exception()


class ExpertBuffers:
    """Slots for one expert each, whatever layer it belongs to.

    Args:
        pack: the target.
        count: slots.
    """

    def __init__(self, pack: FlashPack, count: int) -> None:
        self.pack = pack
        self.counters = ExpertCounters()
        blocks = pack.blocks("expert")
        self.layers = sorted({block.layer for block in blocks})
        """Decoder layers with routed experts: their positions here number the MoE layers."""
        self._blocks: dict[tuple[int, int], Block] = {}
        """(MoE layer position, expert) -> its block."""
        for block in blocks:
            position = self.layers.index(block.layer)
            self._blocks[position, block.expert] = block
        self._buffers = Buffer.several(count, block_memory(blocks))
        self._views: dict[tuple[int, int], Tensors] = {}
        """(MoE layer position, id of a buffer) -> views of an expert that lies there."""

    def __len__(self) -> int:
        return len(self._buffers)

    @property
    def buffers(self) -> list[Buffer]:
        """All memory that holds experts."""
        return list(self._buffers)

    def submit(self, read: ExpertRead) -> None:
        """Start a read into its slot. Mutates: the read and the counters."""
        block = self._blocks[read.layer, read.expert]
        read.arrival = self.pack.submit(block, self._buffers[read.slot])
        self.counters.reads += 1
        self.counters.nbytes += block.nbytes

    def wait(self, read: ExpertRead) -> Tensors:
        """The weights of an expert that was submitted, once all bytes are there and right.

        Raises:
            FlashError: it cannot be read, or is damaged.
        """
        assert read.arrival is not None
        block = self._blocks[read.layer, read.expert]
        buffer = self._buffers[read.slot]
        begin = time.perf_counter()
        self.pack.arrive(block, buffer, read.arrival)
        self.counters.wait_us += (time.perf_counter() - begin) * 1e6
        self.pack.check(block, buffer)
        return self.tensors(read.layer, read.expert, read.slot)

    def exchange(self, one: int, other: int) -> None:
        """Let two slots change their contents; no byte is copied. Mutates."""
        buffers = list(self._buffers)
        buffers[one], buffers[other] = buffers[other], buffers[one]
        # In one assignment: an interrupt must not leave a buffer in both places.
        self._buffers = buffers

    def tensors(self, layer: int, expert: int, slot: int) -> Tensors:
        """Views of an expert in a slot; made once for each layer and buffer."""
        buffer = self._buffers[slot]
        key = (layer, id(buffer))
        if key not in self._views:
            self._views[key] = tensors_in(self._blocks[layer, expert], buffer)
        return self._views[key]
