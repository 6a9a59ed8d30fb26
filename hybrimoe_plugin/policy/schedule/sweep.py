"""The plain twin of the search in `thresholds` and `frontier`: a sweep over two thresholds, then
exchanges in small calls.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from hybrimoe_plugin.core import OFFLOADED, LayerPlan, Routed
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule.exchange import exchange
from hybrimoe_plugin.policy.schedule.machine_model import (
    build_plan,
    load_of,
    missing_of,
    present_of,
    ready_of,
    soonest_first,
)

EXCHANGE_LIMIT = 12
"""Experts of a call up to which exchanges are tried: their number grows with the square."""


def swept_plan(routed: Sequence[Routed], costs: CostModel, link_free_us: float) -> LayerPlan:
    """A plan near the optimum.

    Args:
        link_free_us: the link is busy with earlier transfers until then.
    """
    missing = missing_of(routed)
    by_load = sorted(present_of(routed), key=load_of, reverse=True)
    plan = _swept(missing, by_load, costs, link_free_us)
    # With weights in flight it can pay to leave the late ones to the CPU instead of the light ones.
    by_arrival = sorted(by_load, key=soonest_first)
    if by_arrival != by_load:
        other = _swept(missing, by_arrival, costs, link_free_us)
        if other.makespan_us < plan.makespan_us:
            plan = other
    if len(routed) <= EXCHANGE_LIMIT:
        return exchange(plan, routed, costs, link_free_us)
    return plan


def _swept(
    missing: Sequence[Routed], present: Sequence[Routed], costs: CostModel, link_free_us: float
) -> LayerPlan:
    """Search both thresholds.

    Args:
        present: in the order in which the accelerator keeps them.
    """
    missing = sorted(missing, key=load_of, reverse=True)
    crossing, kept = _thresholds(missing, present, costs, link_free_us)
    cpu = [*missing[crossing:], *present[kept:]]
    cpu.sort(key=load_of)
    in_slots = sorted(present[:kept], key=ready_of)
    return build_plan(cpu, in_slots, missing[:crossing], costs, link_free_us)


def _thresholds(
    missing: Sequence[Routed], present: Sequence[Routed], costs: CostModel, link_free_us: float
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
    transfer = costs.transfer_us
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
