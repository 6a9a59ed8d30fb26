"""The decision loop of one model: learn -> plan -> place -> look ahead, over pure policies.

The engine drives it with real backends, the replay simulator with a simulated clock: what is simulated is what runs.
All times are microseconds on the caller's clock. Layers are numbered by position among the MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter_ns
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, LayerPlan, Routed
from hybrimoe_plugin.policy.confidence import Confidence
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.prefetch import Prediction, Prefetcher
from hybrimoe_plugin.policy.ranked import CachePolicy
from hybrimoe_plugin.policy.schedule import Scheduler
from hybrimoe_plugin.policy.slots import SlotPool


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


class Idle(NamedTuple):
    """The time from the start of the running call to the predicted start of the next layer's."""

    now_us: float
    until_us: float


KEPT = math.inf
"""Worth of an expert that cannot or must not be evicted."""


class Controller:
    """Owns residency and link bookkeeping of one model and asks the policies.

    Args:
        pool: slots, empty at first.
        prefill: scheduler for calls with more than one token; `decode` for the others.
        expert_bytes: bytes of one expert, for the counters.
    """

    def __init__(
        self,
        pool: SlotPool,
        costs: CostModel,
        prefill: Scheduler,
        decode: Scheduler,
        cache: CachePolicy,
        prefetcher: Prefetcher | None,
        expert_bytes: int,
    ) -> None:
        self.pool = pool
        self.costs = costs
        self.prefill = prefill
        self.decode = decode
        self.cache = cache
        self.prefetcher = prefetcher
        self.expert_bytes = expert_bytes
        self.counters = Counters()
        self.confidence = Confidence()
        self.link_free_us = 0.0
        """When the link has delivered everything it was given."""
        self._arrivals: dict[ExpertRef, float] = {}
        self._unused: set[ExpertRef] = set()
        """Prefetched and not needed yet."""
        self._worth = np.full(cache.ranks.shape, KEPT)
        """[L, E] what each evictable expert is worth in its slot; `KEPT` for all others."""
        self._layer_us = 0.0
        """Moving average of the time from one layer to the next."""

    def warm_start(self) -> list[Move]:
        """Fill every layer's quota with the cache's first choice; the caller loads them before the first call."""
        moves = []
        for layer, quota in enumerate(self.pool.quotas):
            for expert in self.cache.initial(layer, quota):
                moves.append(Move(layer, expert, self.pool.place(layer, expert), 0.0, 0.0))
                self.pool.arrive(layer, expert)
            self._value(layer)
        return moves

    def begin(self, layer: int, loads: Mapping[int, int], tokens: int, now_us: float) -> Step:
        """Plan one layer call and give its demand loads their slots.

        Args:
            loads: expert -> tokens of this call that chose it; only experts with a token.
            tokens: T of this call.
        """
        started = perf_counter_ns()
        self._land(now_us)
        routed = tuple(Routed(expert, load, self._ready_us(layer, expert, now_us)) for expert, load in loads.items())
        scheduler = self.decode if tokens == 1 else self.prefill
        plan = scheduler.plan(routed, max(0.0, self.link_free_us - now_us))
        self.pool.lease(layer, plan.accelerator)
        self._value(layer)
        moves = tuple(self._load(layer, expert, now_us) for expert in plan.onload)
        self._count(layer, routed, plan, tokens)
        self.confidence.check(layer, loads, tokens > 1)
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3
        return Step(layer, tokens, routed, plan, moves)

    def learn(
        self,
        layer: int,
        topk_ids: NDArray[np.int64],
        topk_weights: NDArray[np.float32],
        scores: NDArray[np.float32] | None,
    ) -> None:
        """Tell the cache what was scored: ids and weights [T, K], scores [T, E] or None."""
        self.cache.observe(layer, topk_ids, topk_weights, scores)

    def look_ahead(self, step: Step, predicted: Iterable[tuple[int, Mapping[int, int]]], now_us: float) -> list[Move]:
        """Spend the link's idle time until the next MoE layer: prefetches first, then fills.

        Args:
            predicted: (layer, expert -> predicted load) of the next layers, nearest first.
            now_us: the start of the running call.

        Source: paper section 4.3 (impact-driven prefetching); confidence, admission and fills are ours.
        """
        started = perf_counter_ns()
        spent_us = step.plan.makespan_us + self.costs.between_layers_us
        self._layer_us += 0.1 * (spent_us - self._layer_us) if self._layer_us else spent_us
        idle = Idle(now_us, now_us + spent_us)
        predictions = self._predictions(step, predicted, now_us)
        moves = self._prefetch(step, predictions, idle)
        moves += self._fill(step, predictions, idle)
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3
        return moves

    def finish(self, step: Step) -> None:
        """The call has been computed: its demand loads have arrived, its slots may be taken."""
        for move in step.moves:
            if self._arrivals.pop(ExpertRef(move.layer, move.expert), None) is not None:
                self.pool.arrive(move.layer, move.expert)
        self.pool.release()
        self._value(step.layer)

    def stale(self, step: Step) -> list[tuple[int, int]]:
        """(expert, slot) of prefetches for the running layer that it does not need and that are still in flight."""
        routed = {item.expert for item in step.routed}
        cached = self.pool.cached[step.layer]
        waiting = (expert for layer, expert in self._unused if layer == step.layer and expert not in routed)
        return [(expert, cached[expert]) for expert in waiting if self.pool.in_flight(step.layer, expert)]

    def withdraw(self, layer: int, expert: int) -> None:
        """Forget a prefetch that the link never carried: its slot is free again."""
        self.pool.withdraw(layer, expert)
        self._unused.discard(ExpertRef(layer, expert))
        del self._arrivals[ExpertRef(layer, expert)]
        self._worth[layer, expert] = KEPT
        self.link_free_us -= self.costs.transfer_us
        self.counters.prefetches -= 1
        self.counters.link_bytes -= self.expert_bytes

    def shrink(self, share: float) -> list[Move]:
        """Keep that share of each layer's quota, best ranked experts first; the caller loads them anew.

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

    def _ready_us(self, layer: int, expert: int, now_us: float) -> float:
        if self.pool.slot_of(layer, expert) is None:
            return OFFLOADED
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
            # What was sent ahead is kept until its layer has run, then `_value` judges it like all others.
            if ref not in self._unused:
                self._worth[ref] = self.cache.ranks[ref]

    def _load(self, layer: int, expert: int, now_us: float) -> Move:
        """A demand load: into the cache where it admits the expert, else through a staging slot."""
        slot = self._admit(layer, expert, layer)
        cached = slot is not None
        move = self._send(layer, expert, self.pool.stage() if slot is None else slot, now_us, cached)
        if cached:
            self.pool.lease(layer, (expert,))
        self.counters.demand_loads += 1
        return move

    def _admit(self, layer: int, expert: int, reach: int, gain_us: float | None = None) -> int | None:
        """A cache slot for a newcomer, or None where nothing may go for it.

        Args:
            reach: where layers share slots, the last layer that may lose one.
            gain_us: expected gain of a prefetch; None for one that comes for its own rank.
        """
        if self.pool.has_room(layer):
            return self.pool.place(layer, expert)
        victim = self._victim(layer, reach)
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
    def _miss_us(self) -> float:
        """What a miss costs, roughly: the cheaper of the two ways to live with it."""
        return min(self.costs.cpu(1), self.costs.transfer_us)

    def _victim(self, layer: int, reach: int) -> ExpertRef | None:
        """The least worthy evictable expert of the layer, or of all layers up to `reach` where they share slots."""
        first, last = (0, reach + 1) if self.pool.shared else (layer, layer + 1)
        place = int(self._worth[first:last].argmin())
        row, expert = divmod(place, len(self._worth[layer]))
        victim = ExpertRef(first + row, expert)
        return None if self._worth[victim] == KEPT else victim

    def _evict(self, victim: ExpertRef) -> None:
        self.pool.evict(*victim)
        self._worth[victim] = KEPT
        self.counters.evictions += 1
        if victim in self._unused:
            self._unused.discard(victim)
            self.counters.prefetches_wasted += 1

    def _send(self, layer: int, expert: int, slot: int, now_us: float, cached: bool) -> Move:
        """Queue one transfer on the link."""
        start = max(self.link_free_us, now_us)
        self.link_free_us = start + self.costs.transfer_us
        if cached:
            self._arrivals[ExpertRef(layer, expert)] = self.link_free_us
        self.counters.link_bytes += self.expert_bytes
        return Move(layer, expert, slot, start, self.link_free_us)

    def _predictions(
        self, step: Step, predicted: Iterable[tuple[int, Mapping[int, int]]], now_us: float
    ) -> list[Prediction]:
        """The later layers as they stand now; predicted experts that are there are kept until their layer has run."""
        if self.prefetcher is None:
            return []
        found, many = [], step.tokens > 1
        for distance, (layer, loads) in enumerate(predicted, 1):
            routed = tuple(Routed(e, load, self._ready_us(layer, e, now_us)) for e, load in loads.items())
            self.confidence.predicted(layer, distance, routed)
            confidence = self.confidence.of(distance, many)
            found.append(Prediction(layer, distance, routed, confidence))
            row = self._worth[layer]
            there = [item.expert for item in routed if row[item.expert] != KEPT]
            sure = self.confidence.of(distance, many, offloaded=False)
            row[there] = np.maximum(row[there], sure) if self.cache.probabilities else KEPT
        return found

    def _prefetch(self, step: Step, predictions: Sequence[Prediction], idle: Idle) -> list[Move]:
        if self.prefetcher is None or not predictions:
            return []
        moves: list[Move] = []
        reach = step.layer if step.tokens > 1 else len(self._worth)
        for request in self.prefetcher.choose(predictions, self._room(idle)):
            layer, expert = request.ref
            gain_us = request.impact_us * request.confidence
            deadline_us = idle.until_us + (request.distance - 1) * self._layer_us
            if not self._may_send(step, predictions, idle, gain_us, deadline_us):
                break
            slot = self._admit(layer, expert, reach, gain_us)
            if slot is not None:
                moves.append(self._send(layer, expert, slot, idle.now_us, cached=True))
                self._unused.add(request.ref)
        self.counters.prefetches += len(moves)
        return moves

    def _fill(self, step: Step, predictions: Sequence[Prediction], idle: Idle) -> list[Move]:
        """Bring misses that the CPU computed into the cache while the link is idle, the most likely ones first."""
        moves: list[Move] = []
        reach = step.layer if step.tokens > 1 else len(self._worth)
        ranks = self.cache.ranks[step.layer]
        missed = [expert for expert in step.plan.cpu if self.pool.slot_of(step.layer, expert) is None]
        for expert in sorted(missed, key=lambda expert: -ranks[expert]):
            gain_us = float(ranks[expert]) * self._miss_us if self.cache.probabilities else 0.0
            if not self._may_send(step, predictions, idle, gain_us, KEPT):
                break
            slot = self._admit(step.layer, expert, reach)
            if slot is not None:
                moves.append(self._send(step.layer, expert, slot, idle.now_us, cached=True))
        self.counters.fills += len(moves)
        return moves

    def _room(self, idle: Idle) -> int:
        """How many prefetches are worth choosing: what fits the idle time, or one that may last longer."""
        transfer_us = self.costs.transfer_us
        if transfer_us <= 0.0:
            return 0
        return max(1, int((idle.until_us - max(self.link_free_us, idle.now_us)) / transfer_us))

    def _may_send(
        self, step: Step, predictions: Sequence[Prediction], idle: Idle, gain_us: float, deadline_us: float
    ) -> bool:
        """Whether one more transfer fits the idle time, or gains more than the demand loads that it would delay."""
        end_us = max(self.link_free_us, idle.now_us) + self.costs.transfer_us
        late_us = end_us - idle.until_us
        if late_us <= 0.0:
            return True
        if gain_us <= 0.0 or end_us > deadline_us or self._layer_us <= 0.0:
            return False
        scheduler = self.decode if step.tokens == 1 else self.prefill
        known = [item.routed for item in predictions if item.confidence > 0.0] or [step.routed]
        loss_us, distance = 0.0, 0
        while late_us > 0.0 and loss_us < gain_us:
            routed = known[min(distance, len(known) - 1)]
            loss_us += scheduler.plan(routed, late_us).makespan_us - scheduler.plan(routed).makespan_us
            late_us -= self._layer_us
            distance += 1
        return loss_us < gain_us

    def _count(self, layer: int, routed: Sequence[Routed], plan: LayerPlan, tokens: int) -> None:
        counters = self.counters
        counters.calls += 1
        counters.tokens += tokens
        counters.activations += len(routed)
        counters.experts_cpu += len(plan.cpu)
        counters.experts_accelerator += len(plan.accelerator)
        for item in routed:
            if item.ready_us != OFFLOADED:
                counters.cache_hits += 1
                ref = ExpertRef(layer, item.expert)
                if ref in self._unused:
                    self._unused.discard(ref)
                    counters.prefetches_used += 1


def loads(ids: NDArray[np.int64]) -> dict[int, int]:
    """Expert -> number of tokens that chose it, for ids [T, K]."""
    if len(ids) == 1:
        return dict.fromkeys(ids[0].tolist(), 1)
    counts = np.bincount(ids.ravel())
    return {int(expert): int(counts[expert]) for expert in np.flatnonzero(counts)}
