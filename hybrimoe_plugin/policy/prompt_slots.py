"""What prompts do with slots: the next layer's come early, and the best of each layer's stay.

In a long prompt every layer needs nearly all of its experts, and the link is what it waits for. Two
rules keep the link busy and leave behind what the answer will need:

- A prefetch takes a staging slot, so nothing has to be evicted for it. Its layer gives a slot back
  when it has run.
- Of all the experts that lie in a layer's slots and in the staging slots when it has run, it keeps
  those of the highest ranks. Demand loads of high ranks go last, so that they still lie there.

The second rule holds too for calls of a few rows that need most of a layer's experts.

Both hold where layers share slots and ranks are probabilities. Elsewhere prefetches evict, and what
is demand-loaded in a prompt is not kept: `budget: layer` is the plain twin.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.policy.residency import Residency
from hybrimoe_plugin.policy.slot_loans import SlotLoans
from hybrimoe_plugin.policy.step import Lenders, Step


class PromptSlots:
    """Lends staging slots to prefetches, and chooses what each layer of a prompt keeps.

    Args:
        residency: places and evicts.
        loans: knows of streaks of prompts.
    """

    def __init__(self, residency: Residency, loans: SlotLoans) -> None:
        self._residency = residency
        self._loans = loans

    @property
    def active(self) -> bool:
        """Whether layers share slots by their experts' probabilities."""
        return self._residency.pool.shared and self._residency.cache.probabilities

    def lend(self, layer: int, expert: int) -> int | None:
        """A staging slot for a prompt's prefetch; None where none can be lent."""
        pool = self._residency.pool
        if not self.active or pool.has_room(layer):
            return None
        return pool.lend(layer, expert)

    def ordered(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        """A prompt's demand loads, in the order in which they are sent.

        More than all staging slots hold: what is worth keeping goes last.

        Args:
            experts: in the plan's order.
        """
        room = self._residency.pool.unlent_staging
        if not self.active or len(experts) <= room:
            return experts
        ranks = self._residency.cache.ranks[layer]
        kept = set(sorted(experts, key=lambda expert: -ranks[expert])[:room])
        return [e for e in experts if e not in kept] + [e for e in experts if e in kept]

    def settle(self, step: Step) -> None:
        """A layer has run and its leases have ended: keep the best of a prompt, and pay debts."""
        residency, pool = self._residency, self._residency.pool
        if step.crowded and self.active:
            self._keep_best(step)
        while pool.debt(step.layer):
            if not pool.can_give_back(step.layer):
                victim = self._least_needed(step)
                if victim is None:
                    return
                residency.evict(victim)
            pool.give_back(step.layer)

    def _keep_best(self, step: Step) -> None:
        """Exchange cached experts for better ones that lie in staging slots; nothing is moved."""
        layer = step.layer
        residency, pool = self._residency, self._residency.pool
        ranks = residency.cache.ranks[layer]
        # Of the loads that went through one staging slot the last one lies there, unless the slot
        # was lent since.
        staged = {move.slot: move.expert for move in step.moves if pool.stages(move.slot)}
        # A prompt's postponed fill may have given it a slot of its own in the meantime.
        cached = pool.cached[layer]
        left = [slot for slot, expert in staged.items() if expert not in cached]
        best_first = sorted(left, key=lambda slot: -ranks[staged[slot]])
        worst_first = sorted(pool.evictable(layer), key=lambda expert: ranks[expert])
        for slot, victim in zip(best_first, worst_first, strict=False):
            expert = staged[slot]
            better = ranks[expert] > ranks[victim]
            if not better or not residency.cache.admits(layer, expert, victim):
                return
            residency.adopt(layer, expert, slot, victim)

    def _least_needed(self, step: Step) -> ExpertRef | None:
        """Whose slot is given back; None where nobody can go.

        In a streak of prompts no layer should pay for another.
        """
        lenders = Lenders(range(step.layer, step.layer + 1))
        if not self._loans.active:
            lenders = self._residency.lenders(step.layer, step.many, step.few)
        self._residency.revalue(step.layer)
        return self._residency.replaced(step.layer, lenders)
