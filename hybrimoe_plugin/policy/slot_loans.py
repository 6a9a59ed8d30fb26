"""Loans: slots that layers lend one another during a streak of prompts.

Where layers share slots, a layer may hold more or less than its quota. In an answer the ranks
decide who holds how much. In a streak of prompts they cannot: every layer needs most of its experts
in each pass, so all that is cached is in use when a demand load comes. Two rules replace them:

- A prefetch may *borrow* the slot of a layer that has run, if it gains more than that layer loses
  in the next prompt.
- A layer below its quota *reclaims* a slot from one above its quota.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, Routed
from hybrimoe_plugin.policy.prompt_streak import PromptStreak
from hybrimoe_plugin.policy.residency import KEPT, Residency
from hybrimoe_plugin.policy.schedule.scheduler import Schedulers
from hybrimoe_plugin.policy.step import Lenders

NEEDED = 0.5
"""Average tokens above which an expert is needed by the next prompt: less rounds to none."""


class Loan(NamedTuple):
    """A slot that a layer could lend."""

    victim: ExpertRef
    """The expert that lies there."""
    loss_us: float
    """How much longer the layer's next prompt takes without it."""


class SlotLoans:
    """Moves slots between layers while prompts follow one another; see the module's docstring."""

    def __init__(self, residency: Residency, schedulers: Schedulers) -> None:
        self.streak = PromptStreak(residency.worth.shape)
        self._residency = residency
        self._schedulers = schedulers
        self._offers: dict[int, Loan] = {}
        """Layer -> what it could lend, as long as nothing has changed there."""

    @property
    def active(self) -> bool:
        """Whether a streak is going on and layers share slots."""
        if not self.streak.active:
            return False
        residency = self._residency
        return residency.pool.shared and residency.cache.probabilities

    def borrow(self, layer: int, expert: int, lenders: Lenders, gain_us: float) -> int | None:
        """A slot for a prompt's prefetch; None where it gains too little.

        Args:
            lenders: layers that may lend one.
            gain_us: what the prefetch gains; it must exceed what the lender loses.
        """
        residency = self._residency
        if layer in residency.pool.on_cpu:
            return None
        if residency.pool.has_room(layer):
            return residency.pool.place(layer, expert)
        cheapest: Loan | None = None
        for lender in lenders.layers:
            loan = self.offer(lender)
            if loan is None:
                continue
            if cheapest is None or loan.loss_us < cheapest.loss_us:
                cheapest = loan
        if cheapest is None or gain_us <= cheapest.loss_us:
            return None
        return residency.replace(cheapest.victim, layer, expert)

    def offer(self, layer: int) -> Loan | None:
        """The layer's evictable expert with the least load in recent prompts; None without any."""
        known = self._offers.get(layer)
        # An offer takes two plans: too many for each layer at each prefetch.
        if known is not None and self._residency.worth[known.victim] != KEPT:
            return known
        worth = self._residency.worth[layer]
        loads = self.streak.loads[layer]
        evictable_loads = np.where(worth == KEPT, KEPT, loads)
        victim = int(evictable_loads.argmin())
        if worth[victim] == KEPT:
            return None
        loss_us = self._loss_us(layer, victim)
        offer = Loan(ExpertRef(layer, victim), loss_us)
        self._offers[layer] = offer
        return offer

    def reclaim(self, layer: int, expert: int) -> int | None:
        """A slot for a layer below its quota, from those above theirs; None without any."""
        residency, pool = self._residency, self._residency.pool
        if pool.has_room(layer) or len(pool.cached[layer]) >= pool.quotas[layer]:
            return None
        debtors = residency.above_quota(residency.lenders(layer, many=False))
        victim = residency.replaced(layer, debtors)
        return None if victim is None else residency.replace(victim, layer, expert)

    def forget(self, layer: int) -> None:
        """The layer has run: what it could lend is to be judged anew."""
        self._offers.pop(layer, None)

    def clear(self) -> None:
        """Judge all layers anew."""
        self._offers.clear()

    def _loss_us(self, layer: int, victim: int) -> float:
        """How much longer the layer's next prompt takes without one of its cached experts."""
        loads = self.streak.loads[layer]
        cached = self._residency.pool.cached[layer]
        needed = []
        without = []
        for expert in np.flatnonzero(loads > NEEDED).tolist():
            ready_us = 0.0 if expert in cached else OFFLOADED
            item = Routed(expert, round(loads[expert]), ready_us)
            needed.append(item)
            if expert == victim:
                item = item._replace(ready_us=OFFLOADED)
            without.append(item)
        makespan_us = self._schedulers.prefill.makespan_us
        return makespan_us(without) - makespan_us(needed)
