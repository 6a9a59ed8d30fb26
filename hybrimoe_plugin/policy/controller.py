"""The decision loop of one model: plan -> place -> learn -> look ahead, over pure policies.

The engine drives it with real backends, the replay simulator with a simulated clock: what is
simulated is what runs. All times are microseconds on the caller's clock. Layers are numbered by
position among the MoE layers.

One layer call:

    begin        the scheduler plans the call; its demand loads get slots and enter the link's queue
                 (the caller launches what the plan says)
    note         the cache policy sees the router's scores; predictions are checked; counters
    look_ahead   the link's idle time until the next layer: prefetches first, then cache fills
    finish       the call has been computed: demand loads have arrived, leases end

A call that makes demand loads notes the scores in `begin`, since the cache then decides which of
them it admits. So nothing is decided otherwise than if every call noted them first, which
`deferred=False` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.core import ExpertRef, LayerPlan, Routed
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
from hybrimoe_plugin.policy.schedule.make import make_scheduler
from hybrimoe_plugin.policy.schedule.scheduler import Scheduler, Schedulers
from hybrimoe_plugin.policy.slot_loans import SlotLoans
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.policy.step import IdleTime as IdleTime
from hybrimoe_plugin.policy.step import Lenders
from hybrimoe_plugin.policy.step import Move as Move
from hybrimoe_plugin.policy.step import Predicted as Predicted
from hybrimoe_plugin.policy.step import Scored as Scored
from hybrimoe_plugin.policy.step import Step as Step
from hybrimoe_plugin.policy.step import loads as loads
from hybrimoe_plugin.policy.transfer_gain import TransferGain

CROWDED = 0.5
"""Share of a layer's experts beyond which a call of a few rows treats slots as a prompt does."""


class Controller:
    """Asks the policies what to do and keeps the books of one model's slots and link.

    Args:
        pool: slots, empty at first.
        costs: read at each call, so measured values may be put in as the model runs.
        prefill: scheduler for prompts; `decode` for the others.
        cache: ranks the experts.
        prefetcher: None for no prefetching.
        expert_bytes: bytes of one expert, for the counters.
        deferred: note a call behind its launches; False to note it before them, the plain twin.
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
        deferred: bool = True,
    ) -> None:
        self.costs = costs
        self.deferred = deferred
        self.counters = Counters()
        self.schedulers = Schedulers(prefill, decode)
        self._cpu_only = make_scheduler("cpu_only", costs, has_accelerator=False)
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
        self._unnoted: tuple[Step, Scored | None] | None = None
        """The running call, until `note` has done its part."""
        self._all_hit: dict[int, tuple[int, bool]] = {}
        """Experts of a token -> version of the costs, whether the accelerator computes them all."""

    @property
    def pool(self) -> SlotPool:
        """The present slots; `shrink` and `recover` replace them."""
        return self.residency.pool

    @property
    def cache(self) -> CachePolicy:
        return self.residency.cache

    @property
    def looks_ahead(self) -> bool:
        """Whether anything is left to send; if not, predictions are of no use."""
        return self.pool.held < self.residency.worth.size

    def warm_start(self) -> list[Move]:
        """Fill every layer's quota with the cache's first choice.

        The caller loads these experts before the first call.
        """
        return self.residency.warm_start()

    def take_between_layers(self, us: float) -> None:
        """Use this time between two MoE layers, as it was measured, from now on."""
        self.costs.between_layers_us = us

    def begin(
        self,
        layer: int,
        loads: Mapping[int, int],
        tokens: int,
        now_us: float,
        scored: Scored | None = None,
    ) -> Step:
        """Plan one layer call and give its demand loads their slots.

        Args:
            loads: expert -> tokens of this call that chose it; only experts with a token.
            tokens: T of this call.
            scored: what the cache learns from, and whether several rows are a few or a prompt's;
                None for nothing to learn, and then several rows are a prompt.
        """
        started = perf_counter_ns()
        residency, pool = self.residency, self.residency.pool
        residency.land(now_us)
        few = scored is not None and scored.few
        many = tokens > 1 and not few
        crowded = many or (few and len(loads) > CROWDED * residency.cache.ranks.shape[1])
        self.loans.streak.follow(layer, loads, tokens if many else 1)
        routed = residency.routed(layer, loads, now_us)
        busy_us = max(0.0, self.link.free_us - now_us)
        on_cpu = layer in pool.on_cpu
        scheduler = self._cpu_only if on_cpu else self.schedulers.for_call(many)
        plan = scheduler.for_rows(few).plan(routed, busy_us)
        pool.lease(layer, plan.accelerator)
        moves: tuple[Move, ...] = ()
        if plan.onload:
            self._learn(layer, plan, scored)
            moves = self._demand_loads(layer, plan.onload, crowded, now_us)
        step = Step(layer, tokens, routed, plan, moves, few, crowded)
        self._unnoted = step, scored
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3
        if not self.deferred:
            self.note(step)
        return step

    def hit(
        self, layer: int, ids: Sequence[int], now_us: float, scored: Scored | None = None
    ) -> Step:
        """The books of one token's call that the accelerator has computed without asking.

        The same as `begin` where the plan leaves all to the accelerator: `all_hit_on_accelerator`.
        All experts lay in slots then. One may have lost its slot since, or have come before the
        link was expected to bring it; the call counts the same.

        Args:
            ids: [K] the token's experts.
            scored: as in `begin`.
        """
        started = perf_counter_ns()
        residency = self.residency
        residency.land(now_us)
        self.loans.streak.follow(layer, {}, 1)
        routed = residency.hits(ids)
        costs, experts = self.costs, tuple(ids)
        busy_us = costs.accelerator_first_us + len(experts) * costs.accelerator(1)
        plan = LayerPlan((), experts, (), busy_us, 0.0, busy_us, 0.0)
        residency.pool.lease(layer, experts)
        step = Step(layer, 1, routed, plan, ())
        self._unnoted = step, scored
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3
        if not self.deferred:
            self.note(step)
        return step

    def all_hit_on_accelerator(self, top_k: int) -> bool:
        """Whether one token's experts, all resident, are all computed by the accelerator.

        Follows the costs as they change; cheap enough to ask before every token.
        """
        version = self.costs.version
        known = self._all_hit.get(top_k)
        if known is None or known[0] != version:
            routed = [Routed(expert, 1, 0.0) for expert in range(top_k)]
            plan = self.schedulers.decode.plan(routed)
            known = self._all_hit[top_k] = version, not plan.cpu
        return known[1]

    def note(self, step: Step) -> None:
        """Learn from a call that has begun; `look_ahead` and `finish` do it where nobody has."""
        if self._unnoted is None:
            return
        started = perf_counter_ns()
        _, scored = self._unnoted
        if not step.moves:
            self._learn(step.layer, step.plan, scored)
        self.counters.count(step.tokens, step.routed, step.plan)
        self.prefetch_record.use_all(step.layer, step.routed)
        self.idle_prefetch.confidence.check(step.layer, step.routed)
        self.link.note_call(step.many, bool(step.moves))
        self._unnoted = None
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3

    def look_ahead(self, step: Step, predicted: Predicted, now_us: float) -> list[Move]:
        """Spend the link's idle time until the next MoE layer: prefetches first, then fills.

        Args:
            predicted: of the next layers.
            now_us: the start of the running call.

        Source: paper section 4.3 (impact-driven prefetching); confidence, admission and fills are
            ours.
        """
        self.note(step)
        started = perf_counter_ns()
        spent_us = step.plan.makespan_us + self.costs.between_layers_us
        self.link.note_layer(spent_us)
        if not self.looks_ahead:
            return []
        if not self.cache_fill.postponed and self.idle_prefetch.needs_nothing(step, predicted):
            return []
        idle = IdleTime(now_us, now_us + spent_us)
        predictions = self.idle_prefetch.predict(step, predicted, idle)
        moves = self.idle_prefetch.send(step, predictions, idle)
        moves += self.cache_fill.send(step, predictions, idle)
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3
        return moves

    def finish(self, step: Step) -> None:
        """The call has been computed: its demand loads have arrived, its slots may be taken."""
        self.note(step)
        self.residency.settle(step.moves)
        self.prompt_slots.settle(step)
        self.residency.revalue(step.layer)
        self.loans.forget(step.layer)

    def verified(self, accepted: NDArray[np.bool_]) -> None:
        """A draft's tree has been verified: correct what the cache learned from its pass.

        That is the last pass. Nothing happens if all its rows were sure, or if it was said before.
        An interrupt leaves ranks that are a mixture of both, and is made good by saying it again.

        Args:
            accepted: [T] for each row of the pass, whether its token is part of the text.

        Raises:
            InputError: the pass had another number of rows; then nothing has changed.
        """
        started = perf_counter_ns()
        self.residency.cache.verified(accepted)
        self.residency.revalue_all()
        self.counters.plan_us += (perf_counter_ns() - started) / 1e3

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
        self._unnoted = None
        self.residency.cache.forget_draft()
        self.residency.recover(held)
        self.link.free_us = 0.0
        self.loans.clear()
        self.idle_prefetch.confidence.forget()
        self.cache_fill.clear()

    def _learn(self, layer: int, plan: LayerPlan, scored: Scored | None) -> None:
        """Let the cache see what was scored, and take its ranks as what experts are worth."""
        if scored is not None:
            self.residency.cache.observe(layer, scored)
        self.residency.revalue(layer, plan.accelerator)

    def _demand_loads(
        self, layer: int, experts: Sequence[int], crowded: bool, now_us: float
    ) -> tuple[Move, ...]:
        """Queue a plan's demand loads in its order; in a crowded call, what may stay goes last."""
        lenders = self.residency.lenders(layer, many=False)
        if crowded:  # Every layer needs most of its experts: none should live at another's cost.
            lenders = Lenders(range(layer, layer + 1))
            experts = self.prompt_slots.ordered(layer, experts)
        return tuple([self._demand_load(layer, expert, lenders, now_us) for expert in experts])

    def _demand_load(self, layer: int, expert: int, lenders: Lenders, now_us: float) -> Move:
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
