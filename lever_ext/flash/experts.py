"""Routed experts on flash: read only those that were chosen, keep the promising ones in DRAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.policy.cache import CachePolicy
from hybrimoe_plugin.policy.slots import SlotPool
from lever_ext.flash.format import Block
from lever_ext.flash.pack import FlashPack, Tensors, block_memory, tensors_in
from lever_ext.flash.reader import Buffer

Compute = Callable[[int, Tensors], None]
"""Called once with each expert that is needed and its weights, which are valid during the call."""


@dataclass
class ExpertCounters:
    """Counts since the start."""

    hits: int = 0
    reads: int = 0
    nbytes: int = 0


@dataclass
class _Read:
    """An expert on its way into a slot."""

    expert: int
    slot: int
    staged: bool
    arrival: Future[None] | None = None


class FlashExpertCache:
    """The expert tier between flash and DRAM: the engine's slot pool and cache policy on another link.

    Args:
        pack: the target.
        slots: cached experts for each MoE layer.
        staging: buffers for experts that the cache does not admit, at least 2.
        policy: ranks experts; MoE layers are counted from 0.
    """

    def __init__(self, pack: FlashPack, slots: int, staging: int, policy: CachePolicy) -> None:
        self.pack = pack
        self.policy = policy
        blocks = pack.blocks("expert")
        self.layers = sorted({block.layer for block in blocks})
        self._blocks: dict[tuple[int, int], Block] = {
            (self.layers.index(block.layer), block.expert): block for block in blocks
        }
        self.pool = SlotPool([slots] * len(self.layers), staging)
        self._buffers = [Buffer(block_memory(blocks)) for _ in range(self.pool.slots)]
        self.counters = ExpertCounters()
        self.chosen: dict[int, NDArray[np.int64]] = {}
        """MoE layer position -> ids [T, K] of its last call."""

    def resident(self) -> list[tuple[int, int]]:
        """(MoE layer position, expert) of everything cached."""
        return [(layer, expert) for layer, cached in enumerate(self.pool.cached) for expert in cached]

    def run(self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor, compute: Compute) -> None:
        """Call `compute` for every expert in ids [T, K]: cached ones first, the others as they arrive.

        Raises:
            FlashError: an expert cannot be read; the cache is as sound as before.

        Mutates: cache and counters.
        """
        ids = topk_ids.cpu().numpy()
        self.chosen[layer] = ids
        self.policy.observe(layer, ids, topk_weights.float().cpu().numpy(), None)
        needed, loads = np.unique(ids, return_counts=True)
        order = [int(needed[i]) for i in np.argsort(-loads, kind="stable")]
        hits = [expert for expert in order if self.pool.slot_of(layer, expert) is not None]
        misses = [expert for expert in order if expert not in hits]
        self.counters.hits += len(hits)
        self.pool.lease(layer, hits)
        reads, waiting = self._place(layer, misses, order), list[_Read]()
        try:
            for read in reads:
                self._submit(layer, read)
            staged = [expert for expert in misses if expert not in {read.expert for read in reads}]
            waiting += [self._stage(layer, expert) for expert in staged[: self.pool.staging]]
            for expert in hits:
                compute(expert, self._tensors(layer, expert, self.pool.cached[layer][expert]))
            for read in reads:
                self._compute(layer, read, compute)
            for following in [*staged[self.pool.staging :], *[None] * len(waiting)]:
                if waiting:
                    read = waiting.pop(0)
                    self._compute(layer, read, compute)
                    if following is not None:
                        waiting.append(self._stage(layer, following, read.slot))
        finally:
            self._settle(layer, reads, waiting)

    def _place(self, layer: int, misses: Sequence[int], keep: Sequence[int]) -> list[_Read]:
        """Give cache slots to the misses that the policy admits."""
        reads = []
        for expert in misses:
            if not self.pool.has_room(layer):
                candidates = self.pool.evictable(layer, keep)
                victim = self.policy.victim(layer, candidates) if candidates else -1
                if victim < 0 or not self.policy.admits(layer, expert, victim):
                    continue
                self.pool.evict(layer, victim)
            reads.append(_Read(expert, self.pool.place(layer, expert), staged=False))
        return reads

    def _stage(self, layer: int, expert: int, slot: int | None = None) -> _Read:
        read = _Read(expert, self.pool.stage() if slot is None else slot, staged=True)
        self._submit(layer, read)
        return read

    def _submit(self, layer: int, read: _Read) -> None:
        block = self._blocks[layer, read.expert]
        read.arrival = self.pack.submit(block, self._buffers[read.slot])
        self.counters.reads += 1
        self.counters.nbytes += block.nbytes

    def _compute(self, layer: int, read: _Read, compute: Compute) -> None:
        assert read.arrival is not None
        read.arrival.result()
        self.pack.check(self._blocks[layer, read.expert], self._buffers[read.slot])
        compute(read.expert, self._tensors(layer, read.expert, read.slot))
        if not read.staged:
            self.pool.arrive(layer, read.expert)

    def _settle(self, layer: int, reads: Sequence[_Read], waiting: Sequence[_Read]) -> None:
        """End the leases; drop what did not arrive whole, once nothing is on its way any more."""
        self.pool.release()
        for read in waiting:
            if read.arrival is not None:
                read.arrival.exception()
        for read in reads:
            if self.pool.in_flight(layer, read.expert):
                if read.arrival is not None:
                    read.arrival.exception()  # its slot must not be given away while bytes still arrive
                self.pool.arrive(layer, read.expert)
                self.pool.evict(layer, read.expert)

    def _tensors(self, layer: int, expert: int, slot: int) -> Tensors:
        return tensors_in(self._blocks[layer, expert], self._buffers[slot])
