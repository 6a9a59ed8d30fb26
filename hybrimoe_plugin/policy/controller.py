"""The decision loop of one model: learn -> plan -> place -> look ahead, over pure policies.

The engine drives it with real backends, the replay simulator with a simulated clock: what is
simulated is what runs. All times are microseconds on the caller's clock. Layers are numbered by
position among the MoE layers.

One layer call:

    learn        the cache policy sees the router's scores
    begin        the scheduler plans the call; its demand loads get slots and enter the link's queue
    look_ahead   the link's idle time until the next layer: prefetches first, then cache fills
    finish       the call has been computed: demand loads have arrived, leases end
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, LayerPlan, Routed
from hybrimoe_plugin.policy.cache.ranked import CachePolicy
from hybrimoe_plugin.policy.cache_fill import CacheFill
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.idle_prefetch import IdlePrefetch
from hybrimoe_plugin.policy.link_time import LinkTime
from hybrimoe_plugin.policy.prefetch.prediction import Prefetcher
from hybrimoe_plugin.policy.prefetch.record import PrefetchRecord
from hybrimoe_plugin.policy.prompt_slots import PromptSlots
from hybrimoe_plugin.policy.residency import Residency
from hybrimoe_plugin.policy.schedule.baselines import CPUOnlyScheduler
from hybrimoe_plugin.policy.schedule.scheduler import Scheduler, Schedulers
from hybrimoe_plugin.policy.slot_loans import SlotLoans
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.policy.step import IdleTime as IdleTime
from hybrimoe_plugin.policy.step import Move as Move
from hybrimoe_plugin.policy.step import Step as Step
from hybrimoe_plugin.policy.transfer_gain import TransferGain


class Controller:
    """Asks the policies what to do and keeps the books of one model's slots and link.

    Args:
        pool: slots, empty at first.
        costs: read at each call, so measured values may be put in as the model runs.
        prefill: scheduler for calls with more than one token; `decode` for the others.
        cache: ranks the experts.
        prefetcher: None for no prefetching.
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
        self.costs = costs
        self.counters = Counters()
        self.schedulers = Schedulers(prefill, decode)
        self._cpu_only = CPUOnlyScheduler(costs)
        self.prefetch_record = PrefetchRecord(self.counters)
        self.residency = Residency(pool, costs, cache, self.prefetch_record, self.counters)
        self.link = LinkTime(costs, self.counters, expert_bytes)
        self.loans = SlotLoans(self.residency, self.schedulers)
        self.prompt_slots = PromptSlots(self.residency, self.loans)
        calibrated = prefetcher is not None and prefetcher.calibrated
        gain = TransferGain(self.residency, self.link, self.schedulers, costs, calibrated)
        self.idle_prefetch = IdlePrefetch(
            prefetcher,
            self.prefetch_record,
            self.residency,
            self.link,
            gain,
            self.loans,
            self.prompt_slots,
        )
        self.cache_fill = CacheFill(self.residency, self.link, gain, self.counters)

    @property
    def pool(self) -> SlotPool:
        """The present slots; `shrink` and `recover` replace them."""
        return self.residency.pool

    @property
    def cache(self) -> CachePolicy:
        return self.residency.cache

    def warm_start(self) -> list[Move]:
        """Fill every layer's quota with the cache's first choice.

        The caller loads these experts before the first call.
        """
        return self.residency.warm_start()

    def take_between_layers(self, us: float) -> None:
        """Use this time between two MoE layers, as it was measured, from now on."""
        self.costs.between_layers_us = us

    def learn(
        self,
        layer: int,
        topk_ids: NDArray[np.int64],
        topk_weights: NDArray[np.float32],
        scores: NDArray[np.float32] | None,
    ) -> None:
        """Tell the cache what was scored: ids and weights [T, K], scores [T, E] or None."""
        self.residency.cache.observe(layer, topk_ids, topk_weights, scores)

    def begin(self, layer: int, loads: Mapping[int, int], tokens: int, now_us: float) -> Step:
        """Plan one layer call and give its demand loads their slots.

        Args:
            loads: expert -> tokens of this call that chose it; only experts with a token.
            tokens: T of this call.
        """
        started = perf_counter_ns()
        residency = self.residency
        residency.land(now_us)
        self.loans.streak.follow(layer, loads, tokens)
        routed = residency.routed(layer, loads, now_us)
        busy_us = max(0.0, self.link.free_us - now_us)
        on_cpu = layer in residency.pool.on_cpu
        scheduler = self._cpu_only if on_cpu else self.schedulers.for_call(tokens)
        plan = scheduler.plan(routed, busy_us)
        residency.pool.lease(layer, plan.accelerator)
        residency.revalue(layer)
        moves = self._demand_loads(layer, plan.onload, tokens, now_us)
        self._count(layer, routed, plan, tokens)
        self.idle_prefetch.confidence.check(layer, loads)
        self.link.note_call(tokens > 1, bool(moves))
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3
        return Step(layer, tokens, routed, plan, moves)

    def look_ahead(
        self, step: Step, predicted: Iterable[tuple[int, Mapping[int, int]]], now_us: float
    ) -> list[Move]:
        """Spend the link's idle time until the next MoE layer: prefetches first, then fills.

        Args:
            predicted: (layer, expert -> predicted load) of the next layers, nearest first.
            now_us: the start of the running call.

        Source: paper section 4.3 (impact-driven prefetching); confidence, admission and fills are
            ours.
        """
        started = perf_counter_ns()
        spent_us = step.plan.makespan_us + self.costs.between_layers_us
        self.link.note_layer(spent_us)
        idle = IdleTime(now_us, now_us + spent_us)
        predictions = self.idle_prefetch.predict(step, predicted, idle)
        moves = self.idle_prefetch.send(step, predictions, idle)
        moves += self.cache_fill.send(step, predictions, idle)
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3
        return moves

    def finish(self, step: Step) -> None:
        """The call has been computed: its demand loads have arrived, its slots may be taken."""
        self.residency.settle(step.moves)
        self.prompt_slots.settle(step)
        self.residency.revalue(step.layer)
        self.loans.forget(step.layer)

    def stale(self, step: Step) -> list[tuple[int, int]]:
        """(expert, slot) of prefetches for the running layer that it does not need after all.

        Only those that are still in flight; the caller may cancel them, then `withdraw` them.
        """
        return self.idle_prefetch.stale(step)

    def withdraw(self, layer: int, expert: int) -> None:
        """Forget a prefetch that the link never carried: its slot is free again."""
        self.idle_prefetch.withdraw(ExpertRef(layer, expert))

    def shrink(self, share: float) -> list[Move]:
        """Keep that share of each layer's quota, best ranked experts first.

        The caller loads the kept experts anew. Only between calls: nothing may be leased.
        """
        return self.residency.shrink(share)

    def restart(self, cache: CachePolicy) -> None:
        """Begin with empty slots and another cache policy for the same model."""
        self.residency.restart(cache)

    def recover(self, held: Mapping[int, ExpertRef]) -> None:
        """Begin anew after a call that did not end, wherever it was: trust the slots alone.

        What was being sent is withdrawn; counters keep what the call had planned.

        Args:
            held: slot -> expert whose bytes are all there.
        """
        self.residency.recover(held)
        self.link.free_us = 0.0
        self.loans.clear()
        self.idle_prefetch.confidence.forget()
        self.cache_fill.clear()

    def _demand_loads(
        self, layer: int, experts: Sequence[int], tokens: int, now_us: float
    ) -> tuple[Move, ...]:
        """Queue the demand loads of a plan, in its order."""
        if not experts:
            return ()
        # In a call of many tokens every layer needs most of its experts: none should live at
        # another's cost.
        lenders = self.residency.lenders(layer, many=False)
        if tokens > 1:
            lenders = range(layer, layer + 1)
            experts = self.prompt_slots.ordered(layer, experts)
        return tuple([self._demand_load(layer, expert, lenders, now_us) for expert in experts])

    def _demand_load(self, layer: int, expert: int, lenders: range, now_us: float) -> Move:
        """Queue one demand load.

        Into the cache where it admits the expert, else through a staging slot.
        """
        residency, pool = self.residency, self.residency.pool
        self.counters.demand_loads += 1
        slot = self.loans.reclaim(layer, expert) if self.loans.active else None
        if slot is None:
            slot = residency.admit(layer, expert, lenders)
        if slot is None:
            return self.link.send(layer, expert, pool.stage(), now_us)
        move = self.link.send(layer, expert, slot, now_us)
        residency.expect(move)
        pool.lease(layer, (expert,))
        return move

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
                self.prefetch_record.use(ExpertRef(layer, item.expert))


def loads(ids: NDArray[np.int64]) -> dict[int, int]:
    """Expert -> number of tokens that chose it, for ids [T, K]."""
    if len(ids) == 1:
        return dict.fromkeys(ids[0].tolist(), 1)
    counts = np.bincount(ids.ravel())
    return {int(expert): int(counts[expert]) for expert in np.flatnonzero(counts)}
