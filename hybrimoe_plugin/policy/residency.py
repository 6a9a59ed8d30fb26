"""Which experts are where: slots, transfers under way, and what each cached expert is worth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, Routed
from hybrimoe_plugin.policy.cache.ranked import CachePolicy
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.prefetch.record import PrefetchRecord
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.policy.step import FEW_ROWS, Lenders, Move

KEPT = math.inf
"""Worth of an expert that cannot or must not be evicted."""
SAFE = 0.5
"""Share of a newcomer's probability of use below which the worth of its victim must lie, where the
newcomer gains little by itself: estimates err, and each exchange costs a transfer.
"""
EVENNESS = 0.002
"""How much less an expert counts as worth where its layer holds twice its quota of slots."""


class Residency:
    """What the slots of one model hold, and which expert a newcomer replaces.

    Args:
        pool: slots, empty at first.
        cache: ranks the experts; a rank is what an expert is worth in its slot.
        prefetched: prefetches that were not used yet keep their slots until their layer has run.
        counters: where evictions are counted.
    """

    def __init__(
        self,
        pool: SlotPool,
        costs: CostModel,
        cache: CachePolicy,
        prefetched: PrefetchRecord,
        counters: Counters,
    ) -> None:
        self.pool = pool
        self.cache = cache
        self.worth = np.full(cache.ranks.shape, KEPT)
        """[L, E] what each evictable expert is worth in its slot; `KEPT` for all others."""
        self._absent = np.full(cache.ranks.shape, KEPT)
        """[L, E] 0 for resident experts, `KEPT` for all others: worth is rank plus this."""
        # Calls of a few rows name dozens of experts: their values are made once.
        self._hits: dict[int, list[Routed]] = {}
        """Load -> each expert as a resident one."""
        self._misses: dict[int, list[Routed]] = {}
        """The same as an offloaded one."""
        self._make_values(1)
        self._costs = costs
        self._prefetched = prefetched
        self._counters = counters
        self._arrivals: dict[int, dict[int, float]] = {}
        """Layer -> expert -> when those that are in flight will have arrived; none empty."""

    def warm_start(self) -> list[Move]:
        """Fill every layer's quota with the cache's first choice.

        The caller loads these experts before the first call.
        """
        moves = []
        for layer, quota in enumerate(self.pool.quotas):
            experts = self.cache.initial(layer, quota)
            moves += self._hold(layer, experts)
        return moves

    def restart(self, cache: CachePolicy) -> None:
        """Begin with empty slots and another cache policy for the same model."""
        pool = self.pool
        self.pool = SlotPool(pool.quotas, pool.staging, pool.shared, pool.on_cpu)
        self.cache = cache
        self._begin_anew()

    def shrink(self, share: float) -> list[Move]:
        """Keep that share of each layer's quota, best ranked experts first.

        The caller loads the kept experts anew. Only between calls: nothing may be leased.
        """
        old = self.pool
        quotas = [int(quota * share) for quota in old.quotas]
        self.pool = SlotPool(quotas, old.staging, old.shared, old.on_cpu)
        self._begin_anew()
        moves = []
        for layer, quota in enumerate(quotas):
            ranks = self.cache.ranks[layer]
            held = list(old.cached[layer])
            held.sort(key=lambda expert: -ranks[expert])
            moves += self._hold(layer, held[:quota])
        return moves

    def recover(self, held: Mapping[int, ExpertRef]) -> None:
        """Keep only what is certain, after a call that did not end.

        Args:
            held: slot -> expert whose bytes are all there.
        """
        self.pool = self.pool.keeping(held)
        self._begin_anew()
        for layer, cached in enumerate(self.pool.cached):
            self._absent[layer, list(cached)] = 0.0
            self.revalue(layer)

    def routed(self, layer: int, loads: Mapping[int, int], at_us: float) -> tuple[Routed, ...]:
        """The experts of a call that begins at `at_us`, with when each can be used.

        Args:
            loads: expert -> tokens of the call that choose it.
        """
        cached, hits, misses = self.pool.cached[layer], self._hits, self._misses
        one_hits, one_misses = hits[1], misses[1]
        arriving = self._arrivals.get(layer)
        found = []
        for expert, load in loads.items():
            if arriving and expert in arriving:
                ready_us = max(0.0, arriving[expert] - at_us)
                found.append(Routed(expert, load, ready_us))
            elif load == 1:
                found.append(one_hits[expert] if expert in cached else one_misses[expert])
            elif load <= FEW_ROWS:
                if load not in hits:
                    self._make_values(load)
                found.append((hits if expert in cached else misses)[load][expert])
            else:
                ready_us = 0.0 if expert in cached else OFFLOADED
                found.append(Routed(expert, load, ready_us))
        return tuple(found)

    def hits(self, experts: Sequence[int]) -> tuple[Routed, ...]:
        """One token's experts, all of which were resident when it was computed."""
        hits = self._hits[1]
        return tuple([hits[expert] for expert in experts])

    def arriving(self, layer: int) -> Iterable[int]:
        """A layer's cached experts that are in flight."""
        return self._arrivals.get(layer, ())

    def land(self, now_us: float) -> None:
        """Mark as resident what the link has delivered by now."""
        if not self._arrivals:
            return
        landed = [
            ExpertRef(layer, expert)
            for layer, arriving in self._arrivals.items()
            for expert, arrival in arriving.items()
            if arrival <= now_us
        ]
        for ref in landed:
            self._leave_link(ref)
            self._arrive(ref)
            # What was prefetched is kept until its layer has run, then `revalue` judges it like all
            # others.
            if ref not in self._prefetched:
                self.worth[ref] = self.cache.ranks[ref]

    def expect(self, move: Move) -> None:
        """A transfer into a cache slot is under way."""
        self._arrivals.setdefault(move.layer, {})[move.expert] = move.end_us

    def settle(self, moves: Iterable[Move]) -> None:
        """A call has been computed: its demand loads have arrived, its leases end."""
        for move in moves:
            ref = ExpertRef(move.layer, move.expert)
            if ref.expert in self._arrivals.get(ref.layer, ()):
                self._leave_link(ref)
                self._arrive(ref)
        self.pool.release()

    def withdraw(self, ref: ExpertRef) -> None:
        """Free the slot of a cached expert that the link never carried."""
        self.pool.withdraw(*ref)
        self._leave_link(ref)
        self.worth[ref] = KEPT

    def revalue(self, layer: int, leased: Sequence[int] = ()) -> None:
        """Take the layer's present ranks as what its evictable experts are worth.

        Args:
            leased: experts that the running call needs.
        """
        worth = self.worth[layer]
        np.add(self.cache.ranks[layer], self._absent[layer], out=worth)
        values: Any = memoryview(worth)  # its numbers are set in a third of an array's time
        for expert in leased:
            values[expert] = KEPT

    def revalue_all(self) -> None:
        """The same for all layers, between two passes: no call needs anything."""
        np.add(self.cache.ranks, self._absent, out=self.worth)

    def protect(self, layer: int, confidence: Mapping[int, float]) -> None:
        """Raise the worth of predicted experts that are there, until their layer has run.

        Args:
            confidence: expert -> probability of being needed.
        """
        worth: Any = memoryview(self.worth[layer])
        probabilities = self.cache.probabilities
        for expert, probability in confidence.items():
            held = worth[expert]
            if held == KEPT:
                continue
            if not probabilities:
                worth[expert] = KEPT
            elif probability > held:
                worth[expert] = probability

    def lenders(self, layer: int, many: bool, few: bool = False) -> Lenders:
        """Layers that may lose a slot to what is sent while `layer` runs.

        In a call of many tokens the layers ahead are about to need all they have. In a call of a
        few rows, most cached experts may never have been chosen and be worth the same: were one
        layer emptied first, its calls would soon miss several experts at once, and only a single
        miss is hidden by the CPU. Demand loads do without: launches wait for them.
        """
        return Lenders(range(layer + 1 if many else len(self.worth)), few)

    def above_quota(self, lenders: Lenders) -> Lenders:
        """Those that hold more experts than their own quota of slots."""
        cached, quotas = self.pool.cached, self.pool.quotas
        layers = [layer for layer in lenders.layers if len(cached[layer]) > quotas[layer]]
        return lenders._replace(layers=layers)

    def admit(
        self, layer: int, expert: int, lenders: Lenders, gain_us: float | None = None
    ) -> int | None:
        """A cache slot for a newcomer, or None where nothing may go for it.

        Args:
            lenders: who may lose one.
            gain_us: expected gain of a prefetch; None for an expert that comes for its own rank.
        """
        if layer in self.pool.on_cpu:
            return None
        if self.pool.has_room(layer):
            return self.pool.place(layer, expert)
        victim = self._victim(layer, lenders)
        if victim is None:
            return None
        if not self._admits(layer, expert, victim, gain_us):
            return None
        return self.replace(victim, layer, expert)

    def replaced(self, layer: int, lenders: Lenders) -> ExpertRef | None:
        """Whom a newcomer would replace; None where there is room, or nobody can go."""
        if self.pool.has_room(layer):
            return None
        return self._victim(layer, lenders)

    def replace(self, victim: ExpertRef, layer: int, expert: int) -> int:
        """Evict one expert for another; gives the slot."""
        slot = self.pool.exchange(victim, layer, expert)
        self._forget(victim)
        return slot

    def evict(self, victim: ExpertRef) -> None:
        """Take an expert's slot; it must be neither leased nor in flight."""
        self.pool.evict(*victim)
        self._forget(victim)

    def adopt(self, layer: int, expert: int, slot: int, victim: int) -> None:
        """Keep an expert in the staging slot where it lies, in exchange for a cached one's slot."""
        self._forget(ExpertRef(layer, victim))
        self.pool.adopt(layer, expert, slot, victim)
        self._absent[layer, expert] = 0.0

    def _make_values(self, load: int) -> None:
        """Make what `routed` gives for each expert with this load."""
        experts = range(self.cache.ranks.shape[1])
        self._misses[load] = [Routed(expert, load, OFFLOADED) for expert in experts]
        self._hits[load] = [Routed(expert, load, 0.0) for expert in experts]

    def _hold(self, layer: int, experts: Sequence[int]) -> list[Move]:
        """Give experts slots at once, as if they had arrived."""
        moves = []
        for expert in experts:
            slot = self.pool.place(layer, expert)
            self._arrive(ExpertRef(layer, expert))
            moves.append(Move(layer, expert, slot, 0.0, 0.0))
        self.revalue(layer)
        return moves

    def _leave_link(self, ref: ExpertRef) -> None:
        """An expert is in flight no longer."""
        arriving = self._arrivals[ref.layer]
        del arriving[ref.expert]
        if not arriving:
            del self._arrivals[ref.layer]

    def _arrive(self, ref: ExpertRef) -> None:
        self.pool.arrive(*ref)
        self._absent[ref] = 0.0

    def _admits(self, layer: int, expert: int, victim: ExpertRef, gain_us: float | None) -> bool:
        """Whether a newcomer is worth more than its victim."""
        newcomer = self.cache.ranks.item(layer, expert)
        worth = self.worth.item(*victim)
        if gain_us is None or self.cache.name == "static":
            return self.cache.prefers(newcomer, worth)
        if not self.cache.probabilities:
            return True
        return gain_us > (worth - newcomer) * self._costs.miss_us

    def _victim(self, layer: int, lenders: Lenders) -> ExpertRef | None:
        """The least worthy evictable expert of the layer, or of all lenders if slots are shared."""
        layers, even = lenders
        if not self.pool.shared:
            layers, even = range(layer, layer + 1), False
        if not layers:
            return None
        # A range makes a view, a list a copy.
        chosen: Any = slice(layers.start, layers.stop) if isinstance(layers, range) else layers
        worth = self.worth[chosen]
        if even:
            lowest = worth.min(axis=1) - EVENNESS * self.pool.excess()[chosen]
            offset = int(lowest.argmin())
            expert = int(worth[offset].argmin())
        else:
            offset, expert = divmod(int(worth.argmin()), worth.shape[1])
        if worth.item(offset, expert) == KEPT:
            return None
        return ExpertRef(layers[offset], expert)

    def _forget(self, victim: ExpertRef) -> None:
        """Count what loses its slot."""
        self.worth[victim] = self._absent[victim] = KEPT
        self._counters.evictions += 1
        self._prefetched.evict(victim)

    def _begin_anew(self) -> None:
        """Forget what was there and what was being sent."""
        self.worth.fill(KEPT)
        self._absent.fill(KEPT)
        self._arrivals.clear()
        self._prefetched.clear()
