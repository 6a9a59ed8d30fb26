"""The machine model that plans are judged by, and the best plan for a given split of the experts.

Three queues run in parallel (paper section 4.2):

- The link delivers one expert after another. All weights of one layer have the same size, so every
  transfer takes the same time.
- The accelerator computes one expert after another, each not before its weights have arrived. It
  pays its launch once.
- The CPU computes one expert after another and pays extra for the first.

A plan's makespan is the later of the two finishes.

Once it is known which experts the accelerator takes, the best order follows: resident and in-flight
experts by arrival, then demand loads by descending accelerator time (Johnson's rule for equal first
stages).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import NamedTuple

from hybrimoe_plugin.core import OFFLOADED, LayerPlan, Routed
from hybrimoe_plugin.policy.costs import CostModel

# Sort keys without tuples: a call of many experts sorts them several times.
load_of = attrgetter("load")
ready_of = attrgetter("ready_us")


class Slice(NamedTuple):
    """One expert on one lane, in microseconds from the start of the call."""

    lane: str
    """`cpu`, `accelerator` or `link`."""
    expert: int
    start_us: float
    end_us: float


class Simulation(NamedTuple):
    """What executing a plan takes in the machine model."""

    makespan_us: float
    cpu_us: float
    accelerator_us: float
    link_us: float
    slices: tuple[Slice, ...]


def simulate(
    plan: LayerPlan, routed: Sequence[Routed], costs: CostModel, link_free_us: float = 0.0
) -> Simulation:
    """Execute a plan in the machine model, expert by expert."""
    by_id = {item.expert: item for item in routed}
    slices: list[Slice] = []
    arrivals = {expert: by_id[expert].ready_us for expert in plan.accelerator}

    link = link_free_us
    for expert in plan.onload:
        arrival = link + costs.transfer_us
        slices.append(Slice("link", expert, link, arrival))
        arrivals[expert] = link = arrival

    launch = costs.accelerator_first_us if plan.accelerator else 0.0
    finish, busy = launch, 0.0
    for expert in plan.accelerator:
        start = max(finish, arrivals[expert])
        finish = start + costs.accelerator(by_id[expert].load)
        busy += finish - start
        slices.append(Slice("accelerator", expert, start, finish))
    busy += launch

    cpu = 0.0
    first = costs.cpu_first_us
    for expert in plan.cpu:
        start = cpu
        cpu += costs.cpu(by_id[expert].load) + first
        first = 0.0
        slices.append(Slice("cpu", expert, start, cpu))

    link_us = len(plan.onload) * costs.transfer_us
    return Simulation(max(finish, cpu), cpu, busy, link_us, tuple(slices))


def assemble(
    routed: Sequence[Routed],
    on_accelerator: Collection[int],
    costs: CostModel,
    link_free_us: float = 0.0,
) -> LayerPlan:
    """The best plan that gives exactly these experts to the accelerator."""
    present: list[Routed] = []
    crossing: list[Routed] = []
    cpu: list[Routed] = []
    for item in routed:
        if item.expert not in on_accelerator:
            cpu.append(item)
        elif item.ready_us == OFFLOADED:
            crossing.append(item)
        else:
            present.append(item)
    present.sort(key=lambda item: (item.ready_us, -item.load, item.expert))
    crossing.sort(key=heaviest_first)
    cpu.sort(key=lightest_first)
    return build_plan(cpu, present, crossing, costs, link_free_us)


def build_plan(
    cpu: Sequence[Routed],
    present: Sequence[Routed],
    crossing: Sequence[Routed],
    costs: CostModel,
    link_free_us: float,
) -> LayerPlan:
    """Build the plan from three ordered lists and predict its times.

    Args:
        cpu: what the CPU computes.
        present: what the accelerator computes from slots, resident or in flight.
        crossing: what the accelerator computes after a demand load.
        link_free_us: the link is busy with earlier transfers until then.
    """
    cpu_us = costs.cpu_first_us if cpu else 0.0
    cost = costs.cpu
    for item in cpu:
        cpu_us += cost(item.load)

    finish = busy = 0.0
    cost, transfer = costs.accelerator, costs.transfer_us
    if present or crossing:
        finish = busy = costs.accelerator_first_us
        for item in present:
            spent = cost(item.load)
            busy += spent
            finish = (finish if finish >= item.ready_us else item.ready_us) + spent
        arrival = link_free_us
        for item in crossing:
            arrival += transfer
            spent = cost(item.load)
            busy += spent
            finish = (finish if finish >= arrival else arrival) + spent

    onload = tuple([item.expert for item in crossing])
    in_slots = tuple([item.expert for item in present])
    return LayerPlan(
        tuple([item.expert for item in cpu]),
        in_slots + onload,
        onload,
        finish if finish >= cpu_us else cpu_us,
        cpu_us,
        busy,
        len(onload) * transfer,
    )


def even_counts(routed: Sequence[Routed]) -> tuple[int, int, int] | None:
    """(missing experts, resident ones, their load) where nothing else matters.

    Returns:
        None for no experts at all, where loads differ, or where an expert is in flight.
    """
    if not routed:
        return None
    _, loads, ready = zip(*routed, strict=True)
    missing, total = ready.count(OFFLOADED), len(routed)
    present = ready.count(0.0)
    if missing + present < total or loads.count(loads[0]) < total:
        return None
    return missing, present, loads[0]


def missing_of(routed: Sequence[Routed]) -> list[Routed]:
    """The experts that are neither resident nor in flight."""
    return [item for item in routed if item.ready_us == OFFLOADED]


def present_of(routed: Sequence[Routed]) -> list[Routed]:
    """The experts that are resident or in flight."""
    return [item for item in routed if item.ready_us != OFFLOADED]


def heaviest_first(item: Routed) -> tuple[int, int]:
    """Sort key: descending load, then the expert's number."""
    return -item.load, item.expert


def lightest_first(item: Routed) -> tuple[int, int]:
    """Sort key: ascending load, then the expert's number."""
    return item.load, item.expert


def soonest_first(item: Routed) -> tuple[float, int]:
    """Sort key: arrival, then descending load."""
    return item.ready_us, -item.load
