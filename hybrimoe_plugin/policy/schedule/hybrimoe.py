"""The default scheduler: a search over two thresholds, near the optimum and fast enough for decode.

Why two thresholds are enough: given how many experts cross the link and how many present ones the
CPU takes, swapping a heavier CPU expert for a lighter accelerator one lowers the CPU's time by more
than it raises the accelerator's, whose time is nearly flat. So the heaviest misses cross the link,
and the accelerator keeps the heaviest present experts. `exchange` then repairs what small, uneven
calls leave.

Example: the CPU takes 20 us a token, the accelerator 10 us an expert, a transfer 40 us. Four
experts are routed: A (4 tokens) and B (1) are resident, C (3) and D (1) are offloaded.

    thresholds: 1 miss crosses (C, the heavier one), 2 present experts stay on the accelerator

    link         |        C crosses        |
    accelerator  |  A  |  B  |             |  C  |
    CPU          |     D     |
                 0    10    20    30      40    50 us      makespan 50 us

The one-sided plans take 180 us (all on the CPU) and 90 us (all on the accelerator, which waits for
C and then D); hits on the accelerator and misses on the CPU takes 80 us.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from hybrimoe_plugin.core import OFFLOADED, LayerPlan, Routed
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule.exchange import exchange
from hybrimoe_plugin.policy.schedule.machine_model import (
    build_plan,
    even_counts,
    soonest_first,
)
from hybrimoe_plugin.policy.schedule.scheduler import Scheduler

EXCHANGE_LIMIT = 12
"""Experts of a call up to which exchanges are tried: their number grows with the square."""

KNOWN_LIMIT = 4096
"""Even calls whose counts are remembered."""

_Counts = tuple[int, int, float]
"""(misses that cross the link, present experts on the accelerator, makespan in us)."""

# Sort keys without tuples where possible: a prefill call sorts hundreds of experts several times.
_load = attrgetter("load")
_ready = attrgetter("ready_us")


class HybriMoEScheduler(Scheduler):
    """Two-threshold search for the smallest makespan, then exchanges in small uneven calls.

    Never worse than either one-sided plan, since both are among the candidates. The module's
    docstring has an example. Source: the goal of paper section 4.2; the search is ours.
    """

    name = "hybrimoe"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._known: dict[tuple[int, int, int], _Counts] = {}
        """(missing, present, load) -> the best counts of an even call on an idle link."""
        self._known_version = costs.version

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        missing, present, even = _divided(routed)
        if even:
            return self._plan_even(missing, present, link_free_us)
        by_load = sorted(present, key=_load, reverse=True)
        plan = self._plan_uneven(missing, by_load, link_free_us)
        if any(item.ready_us > 0.0 for item in present):
            # With weights in flight it can pay to leave the late ones to the CPU instead of the
            # light ones.
            by_arrival = sorted(present, key=soonest_first)
            if by_arrival != by_load:
                other = self._plan_uneven(missing, by_arrival, link_free_us)
                if other.makespan_us < plan.makespan_us:
                    plan = other
        if len(routed) <= EXCHANGE_LIMIT:
            return exchange(plan, routed, self._costs, link_free_us)
        return plan

    def _plan_even(
        self, missing: Sequence[Routed], present: Sequence[Routed], link_free_us: float
    ) -> LayerPlan:
        """All loads equal and nothing in flight, as in decode: exact, since only counts matter."""
        total = len(missing) + len(present)
        if not total:
            return LayerPlan((), (), (), 0.0, 0.0, 0.0, 0.0)
        costs = self._costs
        load = missing[0].load if missing else present[0].load
        cpu, accelerator = costs.cpu(load), costs.accelerator(load)
        crossing, kept, makespan_us = self._counts(len(missing), len(present), load, link_free_us)
        if kept == total:
            hits = tuple([item.expert for item in present])
            busy_us = costs.accelerator_first_us + total * accelerator
            return LayerPlan((), hits, (), makespan_us, 0.0, busy_us, 0.0)
        onload = [item.expert for item in missing[:crossing]]
        in_slots = [item.expert for item in present[:kept]]
        on_cpu = [item.expert for item in missing[crossing:]]
        on_cpu += [item.expert for item in present[kept:]]
        taken = crossing + kept
        left = total - taken
        return LayerPlan(
            tuple(on_cpu),
            tuple(in_slots + onload),
            tuple(onload),
            makespan_us,
            costs.cpu_first_us + left * cpu if left else 0.0,
            costs.accelerator_first_us + taken * accelerator if taken else 0.0,
            crossing * costs.transfer_us,
        )

    def makespan_us(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> float:
        counts = even_counts(routed)
        if counts is None:
            return self.plan(routed, link_free_us).makespan_us
        return self._counts(*counts, link_free_us)[2]

    def even_makespan_us(self, missing: int, present: int, load: int) -> float:
        return self._counts(missing, present, load, 0.0)[2]

    def _counts(self, missing: int, present: int, load: int, link_free_us: float) -> _Counts:
        """The best counts for equal loads; those on an idle link are remembered.

        Where nothing should cross an idle link, nothing should cross a busy one.
        """
        known = self._known
        if self._known_version != self._costs.version or len(known) > KNOWN_LIMIT:
            known.clear()
            self._known_version = self._costs.version
        call = missing, present, load
        counts = known.get(call)
        if counts is None:
            counts = known[call] = self._even_counts(*call, 0.0)
        if link_free_us > 0.0 and counts[0]:
            return self._even_counts(*call, link_free_us)
        return counts

    def _even_counts(self, missing: int, present: int, load: int, link_free_us: float) -> _Counts:
        costs = self._costs
        cpu, accelerator = costs.cpu(load), costs.accelerator(load)
        transfer = costs.transfer_us
        cpu_first, first = costs.cpu_first_us, costs.accelerator_first_us
        total = missing + present
        best, best_crossing, best_kept = OFFLOADED, 0, present
        # `gap` is the latest (arrival - work queued before it) of the crossing experts.
        gap, arrival = 0.0, link_free_us
        for crossing in range(missing + 1):
            if crossing:
                arrival += transfer
                gap = max(gap, arrival - (crossing - 1) * accelerator)
            kept = present
            while True:
                left = total - crossing - kept
                cpu_us = cpu_first + left * cpu if left else 0.0
                finish = 0.0
                if kept or crossing:
                    finish = max(first + kept * accelerator, gap) + crossing * accelerator
                makespan = finish if finish >= cpu_us else cpu_us
                if makespan < best:
                    best, best_crossing, best_kept = makespan, crossing, kept
                # Giving the CPU one more only helps while the accelerator is the later one and
                # would gain by it.
                if finish <= cpu_us or not kept or cpu_us + cpu >= best:
                    break
                kept -= 1
            if arrival >= best:
                break
        return best_crossing, best_kept, best

    def _plan_uneven(
        self, missing: Sequence[Routed], present: Sequence[Routed], link_free_us: float
    ) -> LayerPlan:
        """Search both thresholds.

        Args:
            present: in the order in which the accelerator keeps them.
        """
        missing = sorted(missing, key=_load, reverse=True)
        crossing, kept = self._thresholds(missing, present, link_free_us)
        cpu = [*missing[crossing:], *present[kept:]]
        cpu.sort(key=_load)
        in_slots = sorted(present[:kept], key=_ready)
        return build_plan(cpu, in_slots, missing[:crossing], self._costs, link_free_us)

    def _thresholds(
        self, missing: Sequence[Routed], present: Sequence[Routed], link_free_us: float
    ) -> tuple[int, int]:
        """The best thresholds, in one sweep over both: O(missing + present).

        The more experts cross, the fewer present ones the best plan leaves to the accelerator, so
        the sweep sees the optimum.

        Args:
            missing: heaviest first.
            present: in the order in which the accelerator keeps them.

        Returns:
            (how many of `missing` cross the link, how many of `present` the accelerator keeps).
        """
        costs, transfer = self._costs, self._costs.transfer_us
        cpu_us = [costs.cpu(item.load) for item in missing]
        accelerator_us = [costs.accelerator(item.load) for item in missing]
        present_cpu = [costs.cpu(item.load) for item in present]
        kept_finish = _prefix_finish(present, costs)
        cpu_left = sum(cpu_us) + costs.cpu_first_us
        best = OFFLOADED
        best_pair = (0, len(present))
        # `queued` is the accelerator time of the crossing experts, `gap` the latest (arrival - work
        # queued before it).
        queued, gap, arrival = 0.0, 0.0, link_free_us
        kept, moved_cpu = len(present), 0.0
        for crossing in range(len(missing) + 1):
            if crossing:
                arrival += transfer
                if arrival >= best:  # the last arrival alone is later than the best plan
                    break
                gap = gap if gap >= arrival - queued else arrival - queued
                queued += accelerator_us[crossing - 1]
                cpu_left -= cpu_us[crossing - 1]
            while True:
                finish = cpu_time = 0.0
                if kept or crossing:
                    ready = kept_finish[kept]
                    finish = queued + (ready if ready >= gap else gap)
                if crossing < len(missing) or kept < len(present):
                    cpu_time = cpu_left + moved_cpu
                makespan = finish if finish >= cpu_time else cpu_time
                if makespan < best:
                    best, best_pair = makespan, (crossing, kept)
                if finish <= cpu_time or kept == 0:
                    break
                kept -= 1
                moved_cpu += present_cpu[kept]
            # The balance point for the next `crossing` lies at or after one step back: with one
            # more expert on the link the CPU has less to do, so it may take one present expert
            # fewer or more; look again from there.
            while kept < len(present):
                if cpu_left + moved_cpu <= queued + max(kept_finish[kept], gap):
                    break
                moved_cpu -= present_cpu[kept]
                kept += 1
        return best_pair


def _divided(routed: Sequence[Routed]) -> tuple[list[Routed], list[Routed], bool]:
    """In one go, since every plan needs it.

    Returns:
        (the experts that are neither resident nor in flight, the others, whether all loads are
        equal and nothing is in flight).
    """
    missing: list[Routed] = []
    present: list[Routed] = []
    even = True
    first = routed[0].load if routed else 0
    for item in routed:
        _, load, ready_us = item
        if load != first:
            even = False
        if ready_us == OFFLOADED:
            missing.append(item)
            continue
        present.append(item)
        if ready_us > 0.0:
            even = False
    return missing, present, even


def _prefix_finish(present: Sequence[Routed], costs: CostModel) -> list[float]:
    """Accelerator finish when it keeps the first n of `present`, for every n; launch included."""
    finish = costs.accelerator_first_us
    finishes = [finish]
    cost = costs.accelerator
    kept: list[Routed] = []
    last = soonest_first(present[0]) if present else (0.0, 0)
    for item in present:
        order = soonest_first(item)
        if order >= last:
            # The accelerator computes it behind those before it.
            kept.append(item)
            last = order
            finish = max(finish, item.ready_us) + cost(item.load)
        else:
            insort(kept, item, key=soonest_first)
            finish = costs.accelerator_first_us
            for earlier in kept:
                finish = max(finish, earlier.ready_us) + cost(earlier.load)
        finishes.append(finish)
    return finishes
