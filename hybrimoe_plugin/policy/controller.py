"""The decision loop of one model: learn -> plan -> place -> look ahead, over pure policies.

The engine drives it with real backends, the replay simulator with a simulated clock: what is simulated is what runs.
All times are microseconds on the caller's clock. Layers are numbered by position among the MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter_ns
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, LayerPlan, Routed
from hybrimoe_plugin.policy.cache import CachePolicy
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.prefetch import Prediction, Prefetcher
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
    routed: tuple[Routed, ...]
    plan: LayerPlan
    moves: tuple[Move, ...]


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
        self.link_free_us = 0.0
        """When the link has delivered everything it was given."""
        self._arrivals: dict[ExpertRef, float] = {}
        self._unused: set[ExpertRef] = set()
        """Prefetched and not needed yet."""

    def warm_start(self) -> list[Move]:
        """Fill every layer's quota with the cache's first choice; the caller loads them before the first call."""
        moves = []
        for layer, quota in enumerate(self.pool.quotas):
            for expert in self.cache.initial(layer, quota):
                moves.append(Move(layer, expert, self.pool.place(layer, expert), 0.0, 0.0))
                self.pool.arrive(layer, expert)
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
        moves = tuple(self._load(layer, expert, now_us) for expert in plan.onload)
        self._count(layer, routed, plan, tokens)
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3
        return Step(layer, routed, plan, moves)

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

        Source: paper section 4.3 (impact-driven prefetching); fills are ours.
        """
        started = perf_counter_ns()
        until = now_us + step.plan.makespan_us + self.costs.between_layers_us
        moves = self._prefetch(step, predicted, now_us, until)
        moves += self._fill(step, now_us, until)
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3
        return moves

    def finish(self, step: Step) -> None:
        """The call has been computed: its demand loads have arrived, its slots may be taken."""
        for move in step.moves:
            if self._arrivals.pop(ExpertRef(move.layer, move.expert), None) is not None:
                self.pool.arrive(move.layer, move.expert)
        self.pool.release()

    def _ready_us(self, layer: int, expert: int, now_us: float) -> float:
        if self.pool.slot_of(layer, expert) is None:
            return OFFLOADED
        return max(0.0, self._arrivals.get(ExpertRef(layer, expert), now_us) - now_us)

    def _land(self, now_us: float) -> None:
        """Mark as resident what the link has delivered by now."""
        for ref in [ref for ref, arrival in self._arrivals.items() if arrival <= now_us]:
            del self._arrivals[ref]
            self.pool.arrive(*ref)

    def _load(self, layer: int, expert: int, now_us: float) -> Move:
        """A demand load: into the cache where it admits the expert, else through a staging slot."""
        slot = self._admit(layer, expert)
        cached = slot is not None
        move = self._send(layer, expert, self.pool.stage() if slot is None else slot, now_us, cached)
        if cached:
            self.pool.lease(layer, (expert,))
        self.counters.demand_loads += 1
        return move

    def _admit(self, layer: int, expert: int, keep: Sequence[int] = ()) -> int | None:
        """A cache slot for a newcomer, or None where nothing may go for it."""
        if self.pool.has_room(layer):
            return self.pool.place(layer, expert)
        candidates = self.pool.evictable(layer, keep)
        if not candidates:
            return None
        victim = self.cache.victim(layer, candidates)
        if not self.cache.admits(layer, expert, victim):
            return None
        self._evict(layer, victim)
        return self.pool.place(layer, expert)

    def _evict(self, layer: int, victim: int) -> None:
        ref = self.pool.evict(layer, victim)
        self.counters.evictions += 1
        if ref in self._unused:
            self._unused.discard(ref)
            self.counters.prefetches_wasted += 1

    def _send(self, layer: int, expert: int, slot: int, now_us: float, cached: bool) -> Move:
        """Queue one transfer on the link."""
        start = max(self.link_free_us, now_us)
        self.link_free_us = start + self.costs.transfer_us
        if cached:
            self._arrivals[ExpertRef(layer, expert)] = self.link_free_us
        self.counters.link_bytes += self.expert_bytes
        return Move(layer, expert, slot, start, self.link_free_us)

    def _prefetch(
        self, step: Step, predicted: Iterable[tuple[int, Mapping[int, int]]], now_us: float, until_us: float
    ) -> list[Move]:
        idle = until_us - max(self.link_free_us, now_us)
        if self.prefetcher is None or idle < self.costs.transfer_us:
            return []
        predictions = [
            Prediction(
                layer,
                distance,
                tuple(Routed(e, load, self._ready_us(layer, e, now_us)) for e, load in loads.items()),
            )
            for distance, (layer, loads) in enumerate(predicted, 1)
        ]
        wanted = {p.layer: [routed.expert for routed in p.routed] for p in predictions}
        moves = []
        for request in self.prefetcher.choose(predictions, idle):
            layer, expert = request.ref
            slot = self._admit(layer, expert, keep=wanted[layer])
            if slot is not None:
                moves.append(self._send(layer, expert, slot, now_us, cached=True))
                self._unused.add(request.ref)
        self.counters.prefetches += len(moves)
        return moves

    def _fill(self, step: Step, now_us: float, until_us: float) -> list[Move]:
        """Bring misses that the CPU computed into the cache while the link is idle."""
        moves: list[Move] = []
        for expert in step.plan.cpu:
            if max(self.link_free_us, now_us) + self.costs.transfer_us > until_us:
                break
            if self.pool.slot_of(step.layer, expert) is None:
                slot = self._admit(step.layer, expert)
                if slot is not None:
                    moves.append(self._send(step.layer, expert, slot, now_us, cached=True))
        self.counters.fills += len(moves)
        return moves

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
