"""What is where: slots, transfers under way, and who gives way to whom."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, LayerPlan, Routed
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.prompt_row import PromptRow
from hybrimoe_plugin.policy.ranked import CachePolicy
from hybrimoe_plugin.policy.slots import SlotPool

KEPT = math.inf
"""Worth of an expert that cannot or must not be evicted."""


class Move(NamedTuple):
    """One expert's weights to be sent into one slot."""

    layer: int
    expert: int
    slot: int
    start_us: float
    """When the link takes it up, as predicted."""
    end_us: float


class Step(NamedTuple):
    """What one layer call is to do. `moves` are the demand loads, in link order."""

    layer: int
    tokens: int
    routed: tuple[Routed, ...]
    plan: LayerPlan
    moves: tuple[Move, ...]


class Ahead(NamedTuple):
    """How a prefetch came about."""

    distance: int
    """Layers over which it was predicted."""
    alone: bool
    """Whether a call of one token sent it."""


class Residency:
    """Slots and link bookkeeping of one model; times are microseconds on the caller's clock.

    Args:
        pool: slots, empty at first.
        expert_bytes: bytes of one expert, for the counters.
    """

    def __init__(
        self, pool: SlotPool, costs: CostModel, cache: CachePolicy, expert_bytes: int
    ) -> None:
        self.pool = pool
        self.costs = costs
        self.cache = cache
        self.expert_bytes = expert_bytes
        self.counters = Counters()
        self.row = PromptRow(cache.ranks.shape)
        self.link_free_us = 0.0
        """When the link has delivered everything it was given."""
        self.by_distance: dict[int, list[int]] = {}
        """Distance -> prefetches issued, and those that were then needed."""
        self._arrivals: dict[ExpertRef, float] = {}
        self._unused: dict[ExpertRef, Ahead] = {}
        """Prefetched and not needed yet."""
        self._postponed: dict[int, list[int]] = {}
        """Layer -> experts that the CPU computed in a prompt and that the link had no time to
        bring.
        """
        self._issued = self._used = 0.0
        """Recent prefetches that calls of one token sent, and how many of them were needed."""
        self._worth = np.full(cache.ranks.shape, KEPT)
        """[L, E] what each evictable expert is worth in its slot; `KEPT` for all others."""

    def warm_start(self) -> list[Move]:
        """Fill every layer's quota with the cache's first choice; the caller loads them before the
        first call.
        """
        moves = []
        for layer, quota in enumerate(self.pool.quotas):
            for expert in self.cache.initial(layer, quota):
                moves.append(Move(layer, expert, self.pool.place(layer, expert), 0.0, 0.0))
                self.pool.arrive(layer, expert)
            self._value(layer)
        return moves

    def shrink(self, share: float) -> list[Move]:
        """Keep that share of each layer's quota, best ranked experts first; the caller loads them
        anew.

        Only between calls: nothing may be leased.
        """
        old = self.pool
        self.pool = SlotPool([int(quota * share) for quota in old.quotas], old.staging, old.shared)
        self._arrivals.clear()
        self._unused.clear()
        moves = []
        for layer, quota in enumerate(self.pool.quotas):
            ranks = self.cache.ranks[layer]
            for expert in sorted(old.cached[layer], key=lambda expert: -ranks[expert])[:quota]:
                moves.append(Move(layer, expert, self.pool.place(layer, expert), 0.0, 0.0))
                self.pool.arrive(layer, expert)
            self._value(layer)
        return moves

    def recover(self, held: Mapping[int, ExpertRef]) -> None:
        """Begin anew after a call that did not end, wherever it was: believe the slots, not the
        books.

        What was being sent is withdrawn; counters keep what the call had planned.

        Args:
            held: slot -> expert whose bytes are all there.
        """
        self.pool = self.pool.keeping(held)
        self.link_free_us = 0.0
        self._arrivals.clear()
        self._unused.clear()
        self._postponed.clear()
        for layer in range(len(self._worth)):
            self._value(layer)

    def stale(self, step: Step) -> list[tuple[int, int]]:
        """(expert, slot) of prefetches for the running layer that it does not need and that are
        still in flight.
        """
        routed = {item.expert for item in step.routed}
        cached = self.pool.cached[step.layer]
        waiting = (
            expert for layer, expert in self._unused if layer == step.layer and expert not in routed
        )
        return [
            (expert, cached[expert])
            for expert in waiting
            if self.pool.in_flight(step.layer, expert)
        ]

    def withdraw(self, layer: int, expert: int) -> None:
        """Forget a prefetch that the link never carried: its slot is free again."""
        self.pool.withdraw(layer, expert)
        ahead = self._unused.pop(ExpertRef(layer, expert))
        self.by_distance[ahead.distance][0] -= 1
        self._issued -= ahead.alone
        del self._arrivals[ExpertRef(layer, expert)]
        self._worth[layer, expert] = KEPT
        self.link_free_us -= self.costs.transfer_us
        self.counters.prefetches -= 1
        self.counters.link_bytes -= self.expert_bytes

    def _ready_us(self, layer: int, expert: int, now_us: float) -> float:
        if expert not in self.pool.cached[layer]:
            return OFFLOADED
        if not self._arrivals:
            return 0.0
        return max(0.0, self._arrivals.get(ExpertRef(layer, expert), now_us) - now_us)

    def _value(self, layer: int) -> None:
        """Take the layer's present ranks as what its evictable experts are worth."""
        row = self._worth[layer]
        row.fill(KEPT)
        evictable = self.pool.evictable(layer)
        row[evictable] = self.cache.ranks[layer, evictable]

    def _land(self, now_us: float) -> None:
        """Mark as resident what the link has delivered by now."""
        for ref in [ref for ref, arrival in self._arrivals.items() if arrival <= now_us]:
            del self._arrivals[ref]
            self.pool.arrive(*ref)
            # What was sent ahead is kept until its layer has run, then `_value` judges it like all
            # others.
            if ref not in self._unused:
                self._worth[ref] = self.cache.ranks[ref]

    def _lenders(self, layer: int, tokens: int) -> range:
        """Layers that may lose a slot to what is sent while `layer` runs, where layers share slots.

        In a call of many tokens those ahead are about to need all they have.
        """
        return range(layer + 1 if tokens > 1 else len(self._worth))

    def _admit(
        self, layer: int, expert: int, lenders: range, gain_us: float | None = None
    ) -> int | None:
        """A cache slot for a newcomer, or None where nothing may go for it.

        Args:
            lenders: where layers share slots, those that may lose one.
            gain_us: expected gain of a prefetch; None for one that comes for its own rank.
        """
        if self.pool.has_room(layer):
            return self.pool.place(layer, expert)
        victim = self._victim(layer, lenders)
        if victim is None:
            return None
        newcomer, worth = float(self.cache.ranks[layer, expert]), float(self._worth[victim])
        if gain_us is None or self.cache.name == "static":
            admitted = self.cache.prefers(newcomer, worth)
        else:
            admitted = not self.cache.probabilities or gain_us > (worth - newcomer) * self._miss_us
        if not admitted:
            return None
        self._evict(victim)
        return self.pool.place(layer, expert)

    @property
    def _in_a_row(self) -> bool:
        """Whether prompts follow one another where layers share slots: all layers then need most
        experts each time.
        """
        return self.row.going and self.pool.shared and self.cache.probabilities

    def _paid_back(self, layer: int, expert: int) -> int | None:
        """A slot for a layer that holds less than its quota, from those that hold more; None where
        there are none.
        """
        held, quotas = [len(cached) for cached in self.pool.cached], self.pool.quotas
        if self.pool.has_room(layer) or held[layer] >= quotas[layer]:
            return None
        debtors = [row for row, count in enumerate(held) if count > quotas[row]]
        if not debtors:
            return None
        place, lent = divmod(int(self._worth[debtors].argmin()), len(self._worth[layer]))
        victim = ExpertRef(debtors[place], lent)
        if self._worth[victim] == KEPT:
            return None
        self._evict(victim)
        return self.pool.place(layer, expert)

    def _keep_heavier(self, step: Step) -> None:
        """Keep demand loads in their staging slots, each in exchange for a cached expert of less
        load.

        In a prompt all that is cached is in use when they come, so the cache could not admit them:
        without this it would hold for ever what it held when the row began.
        """
        layer, loads = step.layer, self.row.loads[step.layer]
        for slot, expert in {move.slot: move.expert for move in step.moves}.items():
            evictable = self.pool.evictable(layer)
            if expert in self.pool.cached[layer] or not evictable:
                continue
            victim = min(evictable, key=lambda other: loads[other])
            if loads[expert] > loads[victim]:
                self._forget(ExpertRef(layer, victim))
                self.pool.adopt(layer, expert, slot, victim)

    @property
    def _miss_us(self) -> float:
        """What a miss costs, roughly: the cheaper of the two ways to live with it."""
        return min(self.costs.cpu(1), self.costs.transfer_us)

    def _victim(self, layer: int, lenders: range) -> ExpertRef | None:
        """The least worthy evictable expert of the layer, or of all lenders where layers share
        slots.
        """
        first, last = (lenders.start, lenders.stop) if self.pool.shared else (layer, layer + 1)
        place = int(self._worth[first:last].argmin())
        row, expert = divmod(place, len(self._worth[layer]))
        victim = ExpertRef(first + row, expert)
        return None if self._worth[victim] == KEPT else victim

    def _evict(self, victim: ExpertRef) -> None:
        self.pool.evict(*victim)
        self._forget(victim)

    def _forget(self, victim: ExpertRef) -> None:
        """Count what goes, and that nobody used it if so."""
        self._worth[victim] = KEPT
        self.counters.evictions += 1
        if victim in self._unused:
            self._unused.pop(victim)
            self.counters.prefetches_wasted += 1

    def _send(self, layer: int, expert: int, slot: int, now_us: float, cached: bool) -> Move:
        """Queue one transfer on the link."""
        start = max(self.link_free_us, now_us)
        self.link_free_us = start + self.costs.transfer_us
        if cached:
            self._arrivals[ExpertRef(layer, expert)] = self.link_free_us
        self.counters.link_bytes += self.expert_bytes
        return Move(layer, expert, slot, start, self.link_free_us)
