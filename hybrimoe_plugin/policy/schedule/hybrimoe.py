"""The default scheduler: a search over two thresholds, near the optimum and fast enough for decode.

How many misses cross the link, and how many present experts the accelerator keeps, is searched by
counts alone where all loads are equal, and in `thresholds` where they differ. In small calls
`frontier` then finds what thresholds cannot. `sweep` is the plain twin of both.

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

from collections.abc import Sequence

from hybrimoe_plugin.core import OFFLOADED, LayerPlan, Routed
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule.frontier import better_split
from hybrimoe_plugin.policy.schedule.machine_model import (
    assemble,
    build_plan,
    ready_of,
)
from hybrimoe_plugin.policy.schedule.scheduler import Scheduler
from hybrimoe_plugin.policy.schedule.sweep import swept_plan
from hybrimoe_plugin.policy.schedule.thresholds import Split, best_split

SMALL = 12
"""Most experts of a call for which all splits are weighed: takes some 20 us, for 40 experts 100."""
SLOPE = 1e-3
"""Share of the makespan up to which the accelerator is taken to need the same for all loads."""

KNOWN_LIMIT = 4096
"""Even calls whose counts are remembered."""

_Counts = tuple[int, int, float]
"""(misses that cross the link, present experts on the accelerator, makespan in us)."""


class HybriMoEScheduler(Scheduler):
    """Two-threshold search for the smallest makespan; all splits are weighed in small uneven calls.

    Never worse than either one-sided plan, since both are among the candidates. The module's
    docstring has an example. Source: the goal of paper section 4.2; the search is ours.

    Args:
        swept: plan uneven calls by `sweep`, the plain twin.
    """

    name = "hybrimoe"

    def __init__(self, costs: CostModel, swept: bool = False) -> None:
        self._costs = costs
        self._swept = swept
        self._known: dict[tuple[int, int, int], _Counts] = {}
        """(missing, present, load) -> the best counts of an even call on an idle link."""
        self._known_version = costs.version

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        costs = self._costs
        missing, present, even, in_flight = _divided(routed)
        if even:
            return self._plan_even(missing, present, link_free_us)
        if self._swept:
            return swept_plan(routed, costs, link_free_us)
        if len(routed) > SMALL:
            split = self._large(missing, present, in_flight, link_free_us)
            return split.plan(costs.transfer_us)
        split = best_split(missing, present, in_flight, costs, link_free_us)
        exact = self._exact(routed, split, in_flight, link_free_us)
        # One token's calls are summed as even ones and those of `sweep` are: prefetching compares
        # their makespans, where rounding would count as a gain.
        return exact or build_plan(*split.sides(), costs, link_free_us)

    def makespan_us(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> float:
        missing, present, even, in_flight = _divided(routed)
        if even:
            load = routed[0].load if routed else 0
            return self._counts(len(missing), len(present), load, link_free_us)[2]
        if self._swept or len(routed) <= SMALL:
            return self.plan(routed, link_free_us).makespan_us
        return self._large(missing, present, in_flight, link_free_us).makespan_us

    def even_makespan_us(self, missing: int, present: int, load: int) -> float:
        return self._counts(missing, present, load, 0.0)[2]

    def _large(
        self,
        missing: list[Routed],
        present: list[Routed],
        in_flight: bool,
        link_free_us: float,
    ) -> Split:
        """A split near the optimum."""
        if in_flight:  # Of equal loads the CPU takes the latest ones first.
            present.sort(key=ready_of)
        return best_split(missing, present, in_flight, self._costs, link_free_us)

    def _exact(
        self, routed: Sequence[Routed], split: Split, in_flight: bool, link_free_us: float
    ) -> LayerPlan | None:
        """The optimum of a small call; None where `split` is it, or close to it.

        Thresholds see the optimum where the accelerator takes the same time for every load and
        waits for nothing in flight.
        """
        costs = self._costs
        loads = [item[1] for item in routed]
        lightest, heaviest = min(loads), max(loads)
        if lightest == heaviest and sum([0.0 < item[2] < OFFLOADED for item in routed]) < 2:
            return None
        if not in_flight:
            slope_us = costs.accelerator(heaviest) - costs.accelerator(lightest)
            if len(routed) * slope_us <= SLOPE * split.makespan_us:
                return None
        chosen = better_split(routed, costs, link_free_us, split.makespan_us)
        return None if chosen is None else assemble(routed, chosen, costs, link_free_us)

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


def _divided(
    routed: Sequence[Routed],
) -> tuple[list[Routed], list[Routed], bool, bool]:
    """In one go, since every plan needs it.

    Returns:
        (the experts that are neither resident nor in flight, the others, whether all loads are
        equal and nothing is in flight, whether anything is in flight).
    """
    missing: list[Routed] = []
    present: list[Routed] = []
    even, in_flight = True, False
    first = routed[0][1] if routed else 0
    # By index: a named tuple's items are unpacked by an iterator, and its names looked up.
    for item in routed:
        ready_us = item[2]
        if item[1] != first:
            even = False
        if ready_us == OFFLOADED:
            missing.append(item)
            continue
        present.append(item)
        if ready_us > 0.0:
            even, in_flight = False, True
    return missing, present, even, in_flight
