"""The optimal split, expert by expert.

A state is what the first experts have been given so far: the CPU's time, the accelerator's finish
and how many cross the link. Experts are added in the order in which the accelerator computes them,
so its finish never has to be revised. Three kinds of states are dropped, and what is left at the
end holds the optimum:

- those that are no better than another with as many crossing experts;
- those that reach the makespan of a known plan;
- those that must reach it, since the CPU cannot do all that the rest leaves to it: in the time
  that is left, the link can bring and the accelerator can compute only so much.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from hybrimoe_plugin.core import OFFLOADED, Routed
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule.machine_model import assemble

LEAST_GAIN = 1e-9
"""Share of the makespan that another split must gain: less is rounding."""

_State = tuple[float, float, int]
"""(time of the CPU, finish of the accelerator, bits of the experts on the accelerator)."""


def optimum_us(
    routed: Sequence[Routed],
    costs: CostModel,
    link_free_us: float = 0.0,
    known_us: float = OFFLOADED,
) -> float:
    """The smallest makespan there is: the oracle for calls too large for `exact_plan`.

    Args:
        link_free_us: the link is busy with earlier transfers until then.
        known_us: makespan of a plan that is known; the nearer to the optimum, the faster.
    """
    best = known_us
    for side in (set(), {item.expert for item in routed}):
        best = min(best, assemble(routed, side, costs, link_free_us).makespan_us)
    chosen = better_split(routed, costs, link_free_us, best)
    if chosen is None:
        return best
    return assemble(routed, chosen, costs, link_free_us).makespan_us


def better_split(
    routed: Sequence[Routed], costs: CostModel, link_free_us: float, makespan_us: float
) -> set[int] | None:
    """The accelerator's experts in the best plan of all with both sides at work.

    Takes longer the more loads differ, and the further `makespan_us` is from the optimum.

    Args:
        link_free_us: the link is busy with earlier transfers until then.
        makespan_us: of the best plan so far.

    Returns:
        None where no such plan is shorter.
    """
    bound = makespan_us * (1 - LEAST_GAIN)
    ordered = sorted(routed, key=_computing_order)
    cpu_times = [costs.cpu(item.load) for item in ordered]
    accelerator_times = [costs.accelerator(item.load) for item in ordered]
    # The CPU's time for what follows each expert, and the most of it that one microsecond of the
    # accelerator saves.
    rest = list(accumulate(reversed(cpu_times), initial=0.0))[::-1]
    saved = max(map(_ratio, cpu_times, accelerator_times), default=0.0)
    arrivals = _arrivals(ordered, costs.transfer_us, link_free_us, bound)
    first_missing = len(ordered)
    while first_missing and ordered[first_missing - 1].ready_us == OFFLOADED:
        first_missing -= 1
    # By how many experts cross, since that decides when the next one can arrive.
    states: list[list[_State]] = [[(costs.cpu_first_us, costs.accelerator_first_us, 0)]]
    for place, item in enumerate(ordered):
        missing = place >= first_missing
        cpu_us, accelerator_us = cpu_times[place], accelerator_times[place]
        spare = bound - rest[place + 1]
        counts = min(len(states) + missing, len(arrivals) + 1)
        following: list[list[_State]] = [[] for _ in range(counts)]
        for crossing, group in enumerate(states):
            ready_us = item.ready_us
            # The heaviest of the missing ones that can still cross are those that come next.
            unsent = min(len(ordered), max(place + 1, first_missing) + len(arrivals) - crossing)
            for cpu, finish, chosen in group:
                cpu += cpu_us
                if cpu + rest[unsent] < bound and cpu - saved * (bound - finish) < spare:
                    following[crossing].append((cpu, finish, chosen))
            if missing:
                if crossing == len(arrivals):
                    continue
                ready_us = arrivals[crossing]
                unsent = min(len(ordered), place + len(arrivals) - crossing)
            for cpu, finish, chosen in group:
                end = (finish if finish >= ready_us else ready_us) + accelerator_us
                if (
                    end < bound
                    and cpu + rest[unsent] < bound
                    and cpu - saved * (bound - end) < spare
                ):
                    following[crossing + missing].append((cpu, end, chosen | 1 << place))
        states = [_unbeaten(group) for group in following]
    ends = [(max(cpu, finish), chosen) for group in states for cpu, finish, chosen in group]
    if not ends:
        return None
    _, best = min(ends)
    return {item.expert for place, item in enumerate(ordered) if best >> place & 1}


def _computing_order(item: Routed) -> tuple[float, int, int]:
    """Sort key: the accelerator's order, then the expert's number."""
    return item.ready_us, -item.load, item.expert


def _ratio(cpu_us: float, accelerator_us: float) -> float:
    return cpu_us / max(accelerator_us, LEAST_GAIN)


def _arrivals(
    ordered: Sequence[Routed], transfer_us: float, link_free_us: float, bound: float
) -> list[float]:
    """When the link delivers one missing expert after another, before `bound`."""
    arrivals = []
    arrival = link_free_us
    for item in ordered:
        if item.ready_us == OFFLOADED:
            arrival += transfer_us
            if arrival >= bound:
                break
            arrivals.append(arrival)
    return arrivals


def _unbeaten(group: list[_State]) -> list[_State]:
    """Those that no other one beats in both times."""
    if len(group) < 2:
        return group
    group.sort()
    kept = []
    least = OFFLOADED
    for state in group:
        if state[1] < least:
            kept.append(state)
            least = state[1]
    return kept
