"""What a transfer in the link's idle time gains, and what it costs the calls that then want the
link.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, Routed
from hybrimoe_plugin.policy.confidence import Confidence
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.prefetch import Prediction, Prefetcher, PrefetchRequest
from hybrimoe_plugin.policy.ranked import CachePolicy
from hybrimoe_plugin.policy.residency import KEPT, Residency, Step
from hybrimoe_plugin.policy.schedule import Scheduler
from hybrimoe_plugin.policy.slots import SlotPool


class Idle(NamedTuple):
    """The time from the start of the running call to the predicted start of the next layer's."""

    now_us: float
    until_us: float


class Loan(NamedTuple):
    """A slot that a layer may lend while prompts follow one another."""

    victim: ExpertRef
    loss_us: float
    """What the layer's next prompt takes longer without it."""


class LinkTime(Residency):
    """Weighs transfers for the time from one layer call to the next.

    Args:
        prefill: scheduler for calls with more than one token; `decode` for the others.
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
        super().__init__(pool, costs, cache, expert_bytes)
        self.prefill = prefill
        self.decode = decode
        self.prefetcher = prefetcher
        self.confidence = Confidence()
        self._demand = [1.0, 1.0]
        """Recent share of layer calls with demand loads: of one token, of many."""
        self._layer_us = 0.0
        """Moving average of the time from one layer to the next."""
        self._loans: dict[int, Loan] = {}
        """Layer -> what it could lend, as long as nothing changed there."""

    def recover(self, held: Mapping[int, ExpertRef]) -> None:
        super().recover(held)
        self.confidence.forget()
        self._loans.clear()

    def _start_us(self, distance: int, idle: Idle) -> float:
        """When the layer at that distance is expected to begin."""
        return idle.until_us + (distance - 1) * self._layer_us

    def _room(self, idle: Idle) -> int:
        """How many prefetches are worth choosing: what fits the idle time, and one or two that may
        end later.
        """
        transfer_us = self.costs.transfer_us
        if transfer_us <= 0.0:
            return 0
        return max(0, int((idle.until_us - max(self.link_free_us, idle.now_us)) / transfer_us)) + 2

    def _end_us(self, idle: Idle) -> float:
        """When one more transfer would have arrived."""
        return max(self.link_free_us, idle.now_us) + self.costs.transfer_us

    def _fill_gain_us(self, layer: int, expert: int, lenders: range) -> float:
        """What the next token gains by a fill."""
        if not self.cache.probabilities:
            return 0.0
        victim = None if self.pool.has_room(layer) else self._victim(layer, lenders)
        lost = 0.0 if victim is None else float(self._worth[victim])
        return (float(self.cache.ranks[layer, expert]) - lost) * self._miss_us

    def _borrow(self, layer: int, expert: int, lenders: range, gain_us: float) -> int | None:
        """A slot for a prompt's prefetch where the next pass may be a prompt too; None where it
        gains too little.

        What the lender loses it needs again in that prompt: the gain must exceed the loss.
        """
        if self.pool.has_room(layer):
            return self.pool.place(layer, expert)
        loans = [loan for lender in lenders if (loan := self._loan(lender)) is not None]
        cheapest = min(loans, key=lambda loan: loan.loss_us, default=None)
        if cheapest is None or gain_us <= cheapest.loss_us:
            return None
        self._evict(cheapest.victim)
        return self.pool.place(layer, expert)

    def _loan(self, layer: int) -> Loan | None:
        """The layer's cached expert with the least load in recent prompts; None where all are in
        use.
        """
        known = self._loans.get(layer)
        # Two plans: too dear for each layer at each prefetch.
        if known is None or self._worth[known.victim] == KEPT:
            loads = self.row.loads[layer]
            victim = int(np.where(self._worth[layer] == KEPT, KEPT, loads).argmin())
            if self._worth[layer, victim] == KEPT:
                return None
            cached = self.pool.cached[layer]
            needed = [
                Routed(e, round(loads[e]), 0.0 if e in cached else OFFLOADED)
                for e in np.flatnonzero(loads > 0.5).tolist()
            ]
            without = [i._replace(ready_us=OFFLOADED) if i.expert == victim else i for i in needed]
            plan = self.prefill.plan
            loss_us = plan(without).makespan_us - plan(needed).makespan_us
            known = self._loans[layer] = Loan(ExpertRef(layer, victim), loss_us)
        return known

    def _gain_us(
        self, step: Step, predictions: Sequence[Prediction], idle: Idle, request: PrefetchRequest
    ) -> float:
        """Expected gain of a prefetch, less what it costs where the link stays busy beyond the next
        layer's start.
        """
        sure = request.confidence
        late_us = self._end_us(idle) - idle.until_us
        if late_us <= 0.0:
            return sure * request.impact_us if request.impact_us else KEPT
        if self.prefetcher is None or not self.prefetcher.calibrated or self._layer_us <= 0.0:
            return 0.0  # as published: only while the link would idle
        before = request.distance - 1
        loss_us = self._loss_us(step, predictions, idle, late_us, before)
        late_us -= before * self._layer_us
        if late_us <= 0.0:
            return sure * request.impact_us - loss_us
        # It arrives while its own layer already runs: still sooner than a demand load would.
        plan = self._scheduler(step).plan
        routed = predictions[before].routed
        coming = [
            i._replace(ready_us=late_us) if i.expert == request.ref.expert else i for i in routed
        ]
        now = plan(routed, max(0.0, late_us - self.costs.transfer_us)).makespan_us
        right, wrong = plan(coming, late_us).makespan_us, plan(routed, late_us).makespan_us
        # The sooner its layer is done, the sooner the layers behind it may want a link that is
        # still busy.
        after_us = late_us - right - self.costs.between_layers_us
        loss_us += self._loss_us(step, predictions[request.distance :], idle, after_us)
        return now - sure * right - (1.0 - sure) * wrong - loss_us

    def _loss_us(
        self,
        step: Step,
        predictions: Sequence[Prediction],
        idle: Idle,
        late_us: float,
        layers: int = 1 << 30,
    ) -> float:
        """What the next `layers` lose if one more transfer keeps the link busy for `late_us` of
        their time.
        """
        known = [item.routed for item in predictions if max(item.confidence.values()) > 0.0] or [
            step.routed
        ]
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
