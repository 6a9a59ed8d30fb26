"""Routed experts on flash: only chosen ones are read, the promising ones stay in DRAM.

One call of a layer that needs the experts 3, 8, 1, 6, 9, most tokens first:

    cached       3          computed at once, while the others arrive
    prefetched   8          read while the layer before computed; cached if the policy admits it
    admitted     1          read into the cache slot of an expert that the policy gives up
    staged       6, 9       read into staging buffers, which the next ones pass through
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.policy.cache import CachePolicy
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.policy.step import Scored
from lever_ext.flash.expert_buffers import ExpertBuffers, ExpertCounters, ExpertRead
from lever_ext.flash.pack import FlashPack, Tensors
from lever_ext.flash.reader import Buffer

Compute = Callable[[int, Tensors], None]
"""Called once with each expert that is needed and its weights, which are valid during the call."""

Predict = Callable[[], torch.Tensor]
"""Ids [T, K] that the next MoE layer's router is expected to choose."""


class FlashExpertCache:
    """The expert tier between flash and DRAM: the engine's slot pool and cache policy.

    Args:
        pack: the target.
        slots: cached experts for each MoE layer.
        staging: buffers for experts that the cache does not admit, at least 2.
        prefetch: buffers for experts that the next layer is predicted to need.
        policy: ranks experts; MoE layers are counted from 0.
    """

    def __init__(
        self,
        pack: FlashPack,
        slots: int,
        staging: int,
        prefetch: int,
        policy: CachePolicy,
    ) -> None:
        self.policy = policy
        moe_layers = len({block.layer for block in pack.blocks("expert")})
        self.pool = SlotPool([slots] * moe_layers, staging)
        self._memory = ExpertBuffers(pack, self.pool.slots + prefetch)
        self.layers = self._memory.layers
        """Decoder layers with routed experts."""
        self._held: dict[int, ExpertRef] = {}
        """Cache slot -> expert whose bytes are all there, and right."""
        self._prefetch_free = self._prefetch_slots()
        self._prefetched: dict[tuple[int, int], ExpertRead] = {}
        """(MoE layer position, expert) -> its read into a prefetch buffer."""
        self.chosen: dict[int, NDArray[np.int64]] = {}
        """MoE layer position -> ids [T, K] of its last call."""

    @property
    def counters(self) -> ExpertCounters:
        return self._memory.counters

    @property
    def buffers(self) -> list[Buffer]:
        """All memory that holds experts."""
        return self._memory.buffers

    def resident(self) -> list[tuple[int, int]]:
        """(MoE layer position, expert) of everything cached."""
        found = []
        for layer, cached in enumerate(self.pool.cached):
            found += [(layer, expert) for expert in cached]
        return found

    def run(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        scores: torch.Tensor | None,
        compute: Compute,
        predict: Predict | None = None,
    ) -> None:
        """Call `compute` for every chosen expert: cached ones first, the others as they arrive.

        Args:
            layer: position among the MoE layers.
            topk_ids: of the model's router, [T, K].
            topk_weights: of the model's router, [T, K].
            scores: [T, E] where the host shows them.
            compute: called with each expert.
            predict: asked once this layer's reads are queued; the next layer's go behind them.

        Raises:
            FlashError: an expert cannot be read; the cache is as sound as before.

        Mutates: cache and counters.
        """
        ids = topk_ids.cpu().numpy()
        self.chosen[layer] = ids
        shown = None if scores is None else scores.float().cpu().numpy()
        self.policy.observe(layer, Scored(ids, topk_weights.float().cpu().numpy(), shown))
        order = _busiest_first(ids)
        hits = [expert for expert in order if self.pool.slot_of(layer, expert) is not None]
        misses = [expert for expert in order if expert not in hits]
        self.counters.hits += len(hits)
        self.pool.lease(layer, hits)
        admitted = self._place(layer, misses, order)
        prefetched = self._prefetched_among(layer, misses)
        placed = {read.expert for read in [*admitted, *prefetched]}
        staged = deque(expert for expert in misses if expert not in placed)
        waiting: list[ExpertRead] = []
        try:
            for read in admitted:
                self._submit(read)
            while staged and len(waiting) < self.pool.staging:
                waiting.append(self._stage(layer, staged.popleft(), self.pool.stage()))
            if predict is not None and self._prefetch_free:
                self._prefetch_layer(layer + 1, predict())
            for expert in hits:
                slot = self.pool.cached[layer][expert]
                compute(expert, self._memory.tensors(layer, expert, slot))
            for read in prefetched:
                compute(read.expert, self._memory.wait(read))
            for read in admitted:
                compute(read.expert, self._memory.wait(read))
                self._arrive(layer, read.expert, read.slot)
            self._keep_prefetched(layer, prefetched, order)
            while waiting:
                read = waiting.pop(0)
                compute(read.expert, self._memory.wait(read))
                if staged:
                    waiting.append(self._stage(layer, staged.popleft(), read.slot))
        finally:
            self._settle(layer, admitted, waiting)

    def prefetch(self, ids: NDArray[np.int64]) -> None:
        """Queue the experts [L, K] of a token that the next pass is sure to hold.

        The first layers' come first, as far as buffers are free. What is not used is dropped when
        its layer has run. Mutates.
        """
        for layer, chosen in enumerate(ids.tolist()):
            for expert in chosen:
                self._queue(layer, expert)

    def recover(self) -> None:
        """Begin anew after a call that did not end, wherever it was.

        What is here for certain is kept, the rest is forgotten. Nothing may be on its way any more.
        Mutates.
        """
        self.pool = self.pool.keeping(self._held)
        self._prefetched.clear()
        self._prefetch_free = self._prefetch_slots()

    def _prefetch_slots(self) -> list[int]:
        return list(range(self.pool.slots, len(self._memory)))

    def _prefetched_among(self, layer: int, misses: Sequence[int]) -> list[ExpertRead]:
        """The reads of those misses that were prefetched."""
        found = []
        for expert in misses:
            if (layer, expert) in self._prefetched:
                found.append(self._prefetched[layer, expert])
        return found

    def _place(self, layer: int, misses: Sequence[int], keep: Sequence[int]) -> list[ExpertRead]:
        """Give cache slots to the misses that the policy admits and that were not prefetched.

        Args:
            keep: experts that must not be evicted for them.
        """
        found = []
        for expert in misses:
            if (layer, expert) in self._prefetched:
                continue
            slot = self._slot_for(layer, expert, keep)
            if slot >= 0:
                found.append(ExpertRead(layer, expert, slot))
        return found

    def _slot_for(self, layer: int, expert: int, keep: Sequence[int]) -> int:
        """A cache slot for an expert, in flight from now on; -1 where the policy refuses it."""
        if not self.pool.has_room(layer):
            candidates = self.pool.evictable(layer, keep)
            victim = self.policy.victim(layer, candidates) if candidates else -1
            if victim < 0 or not self.policy.admits(layer, expert, victim):
                return -1
            self.pool.evict(layer, victim)
        return self.pool.place(layer, expert)

    def _prefetch_layer(self, layer: int, predicted: torch.Tensor) -> None:
        """Queue the experts that a layer most likely needs, as far as buffers are free."""
        for expert in _busiest_first(predicted.cpu().numpy()):
            self._queue(layer, expert)

    def _queue(self, layer: int, expert: int) -> None:
        """Prefetch an expert, if it is not here and a buffer is free."""
        cached = self.pool.slot_of(layer, expert) is not None
        if cached or (layer, expert) in self._prefetched or not self._prefetch_free:
            return
        read = ExpertRead(layer, expert, self._prefetch_free.pop())
        self._submit(read)
        self._prefetched[layer, expert] = read
        self.counters.prefetches += 1

    def _keep_prefetched(
        self,
        layer: int,
        prefetched: Sequence[ExpertRead],
        keep: Sequence[int],
    ) -> None:
        """Cache what was prefetched and used, where the policy admits it."""
        self.counters.prefetches_used += len(prefetched)
        for read in prefetched:
            slot = self._slot_for(layer, read.expert, keep)
            if slot >= 0:
                self._held.pop(slot, None)
                self._memory.exchange(slot, read.slot)
                self._arrive(layer, read.expert, slot)

    def _stage(self, layer: int, expert: int, slot: int) -> ExpertRead:
        read = ExpertRead(layer, expert, slot)
        self._submit(read)
        return read

    def _submit(self, read: ExpertRead) -> None:
        self._held.pop(read.slot, None)
        self._memory.submit(read)

    def _arrive(self, layer: int, expert: int, slot: int) -> None:
        self._held[slot] = ExpertRef(layer, expert)
        self.pool.arrive(layer, expert)

    def _settle(
        self,
        layer: int,
        admitted: Sequence[ExpertRead],
        waiting: Sequence[ExpertRead],
    ) -> None:
        """End the leases; drop what did not arrive whole, once nothing is on its way any more."""
        self.pool.release()
        passed = [key for key in self._prefetched if key[0] <= layer]
        for read in [*waiting, *(self._prefetched[key] for key in passed)]:
            read.settle()
        self._prefetch_free += [self._prefetched.pop(key).slot for key in passed]
        for read in admitted:
            if self.pool.in_flight(layer, read.expert):
                # Its slot must not be given away while bytes still arrive.
                read.settle()
                self.pool.arrive(layer, read.expert)
                self.pool.evict(layer, read.expert)


def _busiest_first(ids: NDArray[np.int64]) -> list[int]:
    """The distinct experts among ids, those that most tokens chose first."""
    experts, loads = np.unique(ids, return_counts=True)
    order = np.argsort(-loads, kind="stable")
    return [int(expert) for expert in experts[order]]
