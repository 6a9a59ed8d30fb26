"""Routed experts on flash: read only those that were chosen, keep the promising ones in DRAM."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.policy.cache import CachePolicy
from hybrimoe_plugin.policy.slots import SlotPool
from lever_ext.flash.format import Block
from lever_ext.flash.pack import FlashPack, Tensors, block_memory, tensors_in
from lever_ext.flash.reader import Buffer

Compute = Callable[[int, Tensors], None]
"""Called once with each expert that is needed and its weights, which are valid during the call."""


Predict = Callable[[], torch.Tensor]
"""Ids [T, K] that the next MoE layer's router is expected to choose."""


@dataclass
class ExpertCounters:
    """Counts since the start."""

    hits: int = 0
    reads: int = 0
    """Experts read, prefetches included."""
    nbytes: int = 0
    prefetches: int = 0
    prefetches_used: int = 0
    wait_us: float = 0.0
    """Time that computing stood still for reads."""


@dataclass
class _Read:
    """An expert on its way into a slot."""

    expert: int
    slot: int
    staged: bool
    arrival: Future[None] | None = None


class FlashExpertCache:
    """The expert tier between flash and DRAM: the engine's slot pool and cache policy on another
    link.

    Args:
        pack: the target.
        slots: cached experts for each MoE layer.
        staging: buffers for experts that the cache does not admit, at least 2.
        ahead: buffers for experts that the next layer is predicted to need.
        policy: ranks experts; MoE layers are counted from 0.
    """

    def __init__(
        self, pack: FlashPack, slots: int, staging: int, ahead: int, policy: CachePolicy
    ) -> None:
        self.pack = pack
        self.policy = policy
        blocks = pack.blocks("expert")
        self.layers = sorted({block.layer for block in blocks})
        self._blocks: dict[tuple[int, int], Block] = {
            (self.layers.index(block.layer), block.expert): block for block in blocks
        }
        self.pool = SlotPool([slots] * len(self.layers), staging)
        self._buffers = Buffer.several(self.pool.slots + ahead, block_memory(blocks))
        self._held: dict[int, ExpertRef] = {}
        """Cache slot -> expert whose bytes are all there, and right."""
        self._ahead_free = list(range(self.pool.slots, self.pool.slots + ahead))
        self._ahead: dict[tuple[int, int], _Read] = {}
        self._views: dict[tuple[int, int], Tensors] = {}
        self.counters = ExpertCounters()
        self.chosen: dict[int, NDArray[np.int64]] = {}
        """MoE layer position -> ids [T, K] of its last call."""

    @property
    def buffers(self) -> list[Buffer]:
        """All memory that holds experts."""
        return list(self._buffers)

    def resident(self) -> list[tuple[int, int]]:
        """(MoE layer position, expert) of everything cached."""
        return [
            (layer, expert) for layer, cached in enumerate(self.pool.cached) for expert in cached
        ]

    def run(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        scores: torch.Tensor | None,
        compute: Compute,
        predict: Predict | None = None,
    ) -> None:
        """Call `compute` for every expert in ids [T, K]: cached ones first, the others as they
        arrive.

        Args:
            layer: position among the MoE layers.
            topk_ids, topk_weights: of the model's router.
            scores: [T, E] where the host shows them.
            predict: asked once this layer's reads are queued; the next layer's go behind them.

        Raises:
            FlashError: an expert cannot be read; the cache is as sound as before.

        Mutates: cache and counters.
        """
        ids = topk_ids.cpu().numpy()
        self.chosen[layer] = ids
        shown = None if scores is None else scores.float().cpu().numpy()
        self.policy.observe(layer, ids, topk_weights.float().cpu().numpy(), shown)
        needed, loads = np.unique(ids, return_counts=True)
        order = [int(needed[i]) for i in np.argsort(-loads, kind="stable")]
        hits = [expert for expert in order if self.pool.slot_of(layer, expert) is not None]
        misses = [expert for expert in order if expert not in hits]
        self.counters.hits += len(hits)
        self.pool.lease(layer, hits)
        reads, waiting = self._place(layer, misses, order), list[_Read]()
        early = [self._ahead[layer, expert] for expert in misses if (layer, expert) in self._ahead]
        placed = {read.expert for read in [*reads, *early]}
        staged = [expert for expert in misses if expert not in placed]
        try:
            for read in reads:
                self._submit(layer, read)
            waiting += [self._stage(layer, expert) for expert in staged[: self.pool.staging]]
            if predict is not None and self._ahead_free:
                self._read_ahead(layer + 1, predict())
            for expert in hits:
                compute(expert, self._tensors(layer, expert, self.pool.cached[layer][expert]))
            for read in [*early, *reads]:
                self._compute(layer, read, compute)
            self._keep_early(layer, early, order)
            for following in [*staged[self.pool.staging :], *[None] * len(waiting)]:
                if waiting:
                    read = waiting.pop(0)
                    self._compute(layer, read, compute)
                    if following is not None:
                        waiting.append(self._stage(layer, following, read.slot))
        finally:
            self._settle(layer, reads, waiting)

    def read_early(self, ids: NDArray[np.int64]) -> None:
        """Queue the experts [L, K] of a token that the next pass is sure to hold, as far as buffers
        are free. Mutates.

        The first layers' come first; what is not used is dropped when its layer has run.
        """
        for layer, chosen in enumerate(ids.tolist()):
            for expert in chosen:
                self._queue(layer, expert)

    def recover(self) -> None:
        """Begin anew after a call that did not end, wherever it was: keep what is here for certain,
        forget the rest.

        Nothing may be on its way any more. Mutates.
        """
        self.pool = self.pool.keeping(self._held)
        self._ahead.clear()
        self._ahead_free = list(range(self.pool.slots, len(self._buffers)))

    def _place(self, layer: int, misses: Sequence[int], keep: Sequence[int]) -> list[_Read]:
        """Give cache slots to the misses that the policy admits and that were not read ahead."""
        unread = [expert for expert in misses if (layer, expert) not in self._ahead]
        return [
            _Read(expert, slot, staged=False)
            for expert in unread
            if (slot := self._slot_for(layer, expert, keep)) >= 0
        ]

    def _slot_for(self, layer: int, expert: int, keep: Sequence[int]) -> int:
        """A cache slot for an expert, in flight from now on; -1 where the policy does not
        admit it.
        """
        if not self.pool.has_room(layer):
            candidates = self.pool.evictable(layer, keep)
            victim = self.policy.victim(layer, candidates) if candidates else -1
            if victim < 0 or not self.policy.admits(layer, expert, victim):
                return -1
            self.pool.evict(layer, victim)
        return self.pool.place(layer, expert)

    def _read_ahead(self, layer: int, predicted: torch.Tensor) -> None:
        """Queue the experts that the next layer most likely needs, as far as buffers are free."""
        experts, loads = np.unique(predicted.cpu().numpy(), return_counts=True)
        for expert in experts[np.argsort(-loads, kind="stable")].tolist():
            self._queue(layer, expert)

    def _queue(self, layer: int, expert: int) -> None:
        """Read an expert ahead, if it is not here and a buffer is free."""
        known = self.pool.slot_of(layer, expert) is not None or (layer, expert) in self._ahead
        if not known and self._ahead_free:
            read = _Read(expert, self._ahead_free.pop(), staged=True)
            self._submit(layer, read)
            self._ahead[layer, expert] = read
            self.counters.prefetches += 1

    def _keep_early(self, layer: int, early: Sequence[_Read], keep: Sequence[int]) -> None:
        """Cache what was read ahead and used, where the policy admits it: buffers change places, no
        byte is copied.
        """
        self.counters.prefetches_used += len(early)
        for read in early:
            slot = self._slot_for(layer, read.expert, keep)
            if slot >= 0:
                self._held.pop(slot, None)
                buffers = list(self._buffers)
                buffers[slot], buffers[read.slot] = buffers[read.slot], buffers[slot]
                self._buffers = (
                    buffers  # at once: an interrupt must not leave one of them in both places
                )
                self._arrive(layer, read.expert, slot)

    def _stage(self, layer: int, expert: int, slot: int | None = None) -> _Read:
        read = _Read(expert, self.pool.stage() if slot is None else slot, staged=True)
        self._submit(layer, read)
        return read

    def _submit(self, layer: int, read: _Read) -> None:
        block = self._blocks[layer, read.expert]
        self._held.pop(read.slot, None)
        read.arrival = self.pack.submit(block, self._buffers[read.slot])
        self.counters.reads += 1
        self.counters.nbytes += block.nbytes

    def _compute(self, layer: int, read: _Read, compute: Compute) -> None:
        assert read.arrival is not None
        begin = time.perf_counter()
        self.pack.arrive(self._blocks[layer, read.expert], self._buffers[read.slot], read.arrival)
        self.counters.wait_us += (time.perf_counter() - begin) * 1e6
        self.pack.check(self._blocks[layer, read.expert], self._buffers[read.slot])
        compute(read.expert, self._tensors(layer, read.expert, read.slot))
        if not read.staged:
            self._arrive(layer, read.expert, read.slot)

    def _arrive(self, layer: int, expert: int, slot: int) -> None:
        self._held[slot] = ExpertRef(layer, expert)
        self.pool.arrive(layer, expert)

    def _settle(self, layer: int, reads: Sequence[_Read], waiting: Sequence[_Read]) -> None:
        """End the leases; drop what did not arrive whole, once nothing is on its way any more."""
        self.pool.release()
        passed = [key for key in self._ahead if key[0] <= layer]
        for read in [*waiting, *(self._ahead[key] for key in passed)]:
            if read.arrival is not None:
                read.arrival.exception()
        self._ahead_free += [self._ahead.pop(key).slot for key in passed]
        for read in reads:
            if self.pool.in_flight(layer, read.expert):
                if read.arrival is not None:
                    # its slot must not be given away while bytes still arrive
                    read.arrival.exception()
                self.pool.arrive(layer, read.expert)
                self.pool.evict(layer, read.expert)

    def _tensors(self, layer: int, expert: int, slot: int) -> Tensors:
        """Views of an expert in a slot; made once for each layer and buffer, whichever expert lies
        there.
        """
        key = (layer, id(self._buffers[slot]))
        if key not in self._views:
            self._views[key] = tensors_in(self._blocks[layer, expert], self._buffers[slot])
        return self._views[key]
