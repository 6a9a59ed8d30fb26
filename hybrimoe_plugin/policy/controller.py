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
from hybrimoe_plugin.policy.prefetch import DOUBTFUL, Prediction, Prefetcher, PrefetchRequest
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


USED_SHARE = 0.4
"""Share of recent prefetches that must have been needed before doubtful ones are tried."""
RARE = 0.1
"""Share of calls with demand loads up to which the link counts as free."""
SLACK = 0.05
"""How sure these must be."""
FADE = 0.9995
"""What is left of old prefetches in that share, from one call to the next."""
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
        self._unused: dict[ExpertRef, int] = {}
        """Prefetched and not needed yet, with the distance over which it was predicted."""
        self.by_distance: dict[int, list[int]] = {}
        """Distance -> prefetches issued, and those that were then needed."""
        self._worth = np.full(cache.ranks.shape, KEPT)
        """[L, E] what each evictable expert is worth in its slot; `KEPT` for all others."""
        self._demand = [1.0, 1.0]
        """Recent share of layer calls with demand loads: of one token, of many."""
        self._issued = self._used = 0.0
        """Recent prefetches, and how many of them were needed."""
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
        plan = (self.decode if tokens == 1 else self.prefill).plan(routed, max(0.0, self.link_free_us - now_us))
        self.pool.lease(layer, plan.accelerator)
        self._value(layer)
        reach = self._reach(layer, tokens)
        moves = tuple(self._load(layer, expert, reach, now_us) for expert in plan.onload)
        self._count(layer, routed, plan, tokens)
        self.confidence.check(layer, loads)
        self._demand[tokens > 1] += 0.02 * (bool(moves) - self._demand[tokens > 1])
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
        distance = self._unused.pop(ExpertRef(layer, expert))
        self.by_distance[distance][0] -= 1
        self._issued -= 1.0
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

    def _reach(self, layer: int, tokens: int) -> int:
        """The last layer that may lose a slot: in a call of many tokens those ahead are about to need all they have."""
        return layer if tokens > 1 else len(self._worth)

    def _load(self, layer: int, expert: int, reach: int, now_us: float) -> Move:
        """A demand load: into the cache where it admits the expert, else through a staging slot."""
        slot = self._admit(layer, expert, reach)
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

    def _predictions(
        self, step: Step, predicted: Iterable[tuple[int, Mapping[int, int]]], now_us: float
    ) -> list[Prediction]:
        """The later layers as they stand now; predicted experts that are there are kept until their layer has run."""
        if self.prefetcher is None:
            return []
        found = []
        for distance, (layer, loads) in enumerate(predicted, 1):
            routed = tuple(Routed(e, load, self._ready_us(layer, e, now_us)) for e, load in loads.items())
            confidence = self.confidence.predicted(layer, distance, routed, step.tokens > 1)
            found.append(Prediction(layer, distance, routed, confidence))
            row = self._worth[layer]
            for item in routed:
                if row[item.expert] != KEPT:
                    row[item.expert] = (
                        max(row[item.expert], confidence[item.expert]) if self.cache.probabilities else KEPT
                    )
        return found

    def _prefetch(self, step: Step, predictions: Sequence[Prediction], idle: Idle) -> list[Move]:
        if self.prefetcher is None or not predictions:
            return []
        moves: list[Move] = []
        reach = self._reach(step.layer, step.tokens)
        for request in self.prefetcher.choose(predictions, self._room(idle), self._floor()):
            layer, expert = request.ref
            if request.confidence < DOUBTFUL and not self._may_doubt(request.distance, idle, step.tokens > 1):
                continue
            gain_us = self._gain_us(step, predictions, idle, request)
            if gain_us <= 0.0:
                continue
            slot = self._admit(layer, expert, reach, gain_us)
            if slot is not None:
                moves.append(self._send(layer, expert, slot, idle.now_us, cached=True))
                self._unused[request.ref] = request.distance
                self.by_distance.setdefault(request.distance, [0, 0])[0] += 1
                self._issued += 1.0
        self.counters.prefetches += len(moves)
        return moves

    def _may_doubt(self, distance: int, idle: Idle, many: bool) -> bool:
        """Whether a doubtful prefetch may be sent now: not before better predictions will be there, nor into the way.

        A transfer that easily fits into one layer's time waits for the prediction of the next layer. One that ends
        late is sent only where hardly any call wants the link.
        """
        if distance > 1 and self.costs.transfer_us < 0.8 * self._layer_us:
            return False
        return self._end_us(idle) <= idle.until_us or self._demand[many] < RARE

    def _floor(self) -> float:
        """How sure a prediction must be: doubtful ones are tried while enough prefetches have been used so far."""
        self._issued *= FADE
        self._used *= FADE
        return SLACK if self._used > USED_SHARE * self._issued else DOUBTFUL

    def _fill(self, step: Step, predictions: Sequence[Prediction], idle: Idle) -> list[Move]:
        """Bring misses that the CPU computed into the cache while the link is idle, the most likely ones first."""
        moves: list[Move] = []
        reach = self._reach(step.layer, step.tokens)
        ranks = self.cache.ranks[step.layer]
        missed = [expert for expert in step.plan.cpu if self.pool.slot_of(step.layer, expert) is None]
        for expert in sorted(missed, key=lambda expert: -ranks[expert]):
            late_us = self._end_us(idle) - idle.until_us
            if late_us > 0.0:
                # A call of many tokens must not wait for the sake of later ones.
                gain_us = self._fill_gain_us(step.layer, expert, reach) if step.tokens == 1 else 0.0
                if gain_us <= 0.0 or gain_us <= self._loss_us(step, predictions, idle, late_us):
                    break
            slot = self._admit(step.layer, expert, reach)
            if slot is not None:
                moves.append(self._send(step.layer, expert, slot, idle.now_us, cached=True))
        self.counters.fills += len(moves)
        return moves

    def _room(self, idle: Idle) -> int:
        """How many prefetches are worth choosing: what fits the idle time, and one or two that may end later."""
        transfer_us = self.costs.transfer_us
        if transfer_us <= 0.0:
            return 0
        return max(0, int((idle.until_us - max(self.link_free_us, idle.now_us)) / transfer_us)) + 2

    def _end_us(self, idle: Idle) -> float:
        """When one more transfer would have arrived."""
        return max(self.link_free_us, idle.now_us) + self.costs.transfer_us

    def _fill_gain_us(self, layer: int, expert: int, reach: int) -> float:
        """What the next token gains by a fill."""
        if not self.cache.probabilities:
            return 0.0
        victim = None if self.pool.has_room(layer) else self._victim(layer, reach)
        lost = 0.0 if victim is None else float(self._worth[victim])
        return (float(self.cache.ranks[layer, expert]) - lost) * self._miss_us

    def _gain_us(self, step: Step, predictions: Sequence[Prediction], idle: Idle, request: PrefetchRequest) -> float:
        """Expected gain of a prefetch, less what it costs where the link stays busy beyond the next layer's start."""
        sure = request.confidence
        late_us = self._end_us(idle) - idle.until_us
        if late_us <= 0.0:
            return sure * request.impact_us if request.impact_us else KEPT
        if not request.impact_us or self._layer_us <= 0.0:
            return 0.0
        before = request.distance - 1
        loss_us = self._loss_us(step, predictions, idle, late_us, before)
        late_us -= before * self._layer_us
        if late_us <= 0.0:
            return sure * request.impact_us - loss_us
        # It arrives while its own layer already runs: still sooner than a demand load would.
        plan = self._scheduler(step).plan
        routed = predictions[before].routed
        coming = [i._replace(ready_us=late_us) if i.expert == request.ref.expert else i for i in routed]
        now = plan(routed, max(0.0, late_us - self.costs.transfer_us)).makespan_us
        right, wrong = plan(coming, late_us).makespan_us, plan(routed, late_us).makespan_us
        return now - sure * right - (1.0 - sure) * wrong - loss_us

    def _loss_us(
        self, step: Step, predictions: Sequence[Prediction], idle: Idle, late_us: float, layers: int = 1 << 30
    ) -> float:
        """What the next `layers` lose if one more transfer keeps the link busy for `late_us` of their time."""
        known = [item.routed for item in predictions if max(item.confidence.values()) > 0.0] or [step.routed]
        plan = self._scheduler(step).plan
        loss_us, distance = 0.0, 0
        while late_us > 0.0 and distance < layers:
            routed = known[min(distance, len(known) - 1)]
            free_us = max(0.0, late_us - self.costs.transfer_us)
            predicted_us = plan(routed, late_us).makespan_us - plan(routed, free_us).makespan_us
            # Predictions err: at least the usual share of calls will want the link.
            loss_us += max(predicted_us, self._demand[step.tokens > 1] * (late_us - free_us))
            late_us -= self._layer_us
            distance += 1
        return loss_us

    def _scheduler(self, step: Step) -> Scheduler:
        return self.decode if step.tokens == 1 else self.prefill

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
                    self.by_distance[self._unused.pop(ref)][1] += 1
                    self._used += 1.0
                    counters.prefetches_used += 1


def loads(ids: NDArray[np.int64]) -> dict[int, int]:
    """Expert -> number of tokens that chose it, for ids [T, K]."""
    if len(ids) == 1:
        return dict.fromkeys(ids[0].tolist(), 1)
    counts = np.bincount(ids.ravel())
    return {int(expert): int(counts[expert]) for expert in np.flatnonzero(counts)}
