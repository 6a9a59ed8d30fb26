"""Local search: improve a plan of a small call by exchanging experts between the two sides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from hybrimoe_plugin.core import LayerPlan, Routed
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule.machine_model import (
    assemble,
    missing_of,
    present_of,
    soonest_first,
)

PAIR_LIMIT = 6
"""Experts of one side up to which pairs are tried: their number grows with the square."""
ROUNDS = 3
"""Exchanges in a row: bounds the time of planning."""
LEAST_GAIN = 1e-9
"""Share of the makespan that an exchange must gain: less is rounding."""

Group = tuple[Routed, ...]
"""Up to two experts that change sides together."""


def exchange(
    plan: LayerPlan, routed: Sequence[Routed], costs: CostModel, link_free_us: float
) -> LayerPlan:
    """Improve a plan by moving up to two experts each way, while that helps.

    Experts of equal load and arrival are interchangeable, so one of each kind is tried.

    Args:
        plan: covers all of `routed`.
        link_free_us: the link is busy with earlier transfers until then.
    """
    by_id = {item.expert: item for item in routed}
    for _ in range(ROUNDS):
        on_accelerator = [by_id[expert] for expert in plan.accelerator]
        on_cpu = [by_id[expert] for expert in plan.cpu]
        better = _better_split(plan, on_accelerator, on_cpu, costs, link_free_us)
        if better is None:
            return plan
        chosen = {item.expert for item in better}
        plan = assemble(routed, chosen, costs, link_free_us)
    return plan


def _better_split(
    plan: LayerPlan,
    on_accelerator: Sequence[Routed],
    on_cpu: Sequence[Routed],
    costs: CostModel,
    link_free_us: float,
) -> list[Routed] | None:
    """What the accelerator should take instead; None where no exchange helps.

    Candidates whose CPU time or accelerator work alone reaches the best makespan are skipped.
    """
    # Only what is clearly better counts: sums in another order differ by rounding.
    best = plan.makespan_us * (1 - LEAST_GAIN)
    found: list[Routed] | None = None
    first_before = costs.cpu_first_us if not on_cpu else 0.0
    joins = _groups(on_cpu)
    for leaves in _groups(on_accelerator):
        cpu_with = plan.cpu_us + _cpu_work(leaves, costs)
        work_without = plan.accelerator_us - _accelerator_work(leaves, costs)
        for join in joins:
            if not leaves and not join:
                continue
            # The extra time of a first expert comes or goes where the CPU gets its only one.
            left = len(on_cpu) + len(leaves) - len(join)
            first_after = costs.cpu_first_us if not left else 0.0
            cpu_us = cpu_with - _cpu_work(join, costs)
            cpu_us += first_before - first_after
            work_us = work_without + _accelerator_work(join, costs)
            if cpu_us >= best or work_us >= best:
                continue
            split = [item for item in on_accelerator if item not in leaves]
            split += join
            finish_us = _accelerator_finish(split, costs, link_free_us)
            makespan = max(cpu_us, finish_us)
            if makespan < best:
                best, found = makespan, split
    return found


def _groups(items: Sequence[Routed]) -> list[Group]:
    """No expert, one of each kind, and pairs of kinds where there are few experts."""
    kinds = {(item.load, item.ready_us): item for item in items}
    groups: list[Group] = [()]
    for item in kinds.values():
        groups.append((item,))
    if len(items) > PAIR_LIMIT:
        return groups
    pairs: dict[tuple[float, ...], Group] = {}
    for one, other in combinations(items, 2):
        kind = (one.load, one.ready_us, other.load, other.ready_us)
        pairs[kind] = (one, other)
    return groups + list(pairs.values())


def _accelerator_finish(split: Sequence[Routed], costs: CostModel, link_free_us: float) -> float:
    """When the accelerator has computed these experts in the best order."""
    if not split:
        return 0.0
    finish = costs.accelerator_first_us
    for item in sorted(present_of(split), key=soonest_first):
        start = max(finish, item.ready_us)
        finish = start + costs.accelerator(item.load)
    arrival = link_free_us
    loads = [item.load for item in missing_of(split)]
    loads.sort(reverse=True)
    for load in loads:
        arrival += costs.transfer_us
        start = max(finish, arrival)
        finish = start + costs.accelerator(load)
    return finish


def _cpu_work(group: Group, costs: CostModel) -> float:
    """Time of these experts on the CPU, without the extra time of the first."""
    return sum([costs.cpu(item.load) for item in group])


def _accelerator_work(group: Group, costs: CostModel) -> float:
    """Time of these experts on the accelerator, without its launch."""
    return sum([costs.accelerator(item.load) for item in group])
