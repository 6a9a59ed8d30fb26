"""Intra-layer scheduling: which routed experts the CPU computes, which the accelerator, which cross
the link.

Machine model (paper section 4.2, three queues). All weights of one layer have the same size, so
every transfer takes the same time and the link delivers one expert after another. The accelerator
computes one expert after another, each not before its weights are there, and pays its launch once.
The CPU computes one expert after another and pays extra for the first. A plan's makespan is the
later of the two finishes.

Given the set of experts that the accelerator takes, the best order is known: what is there, by
arrival, then demand loads by descending accelerator time (Johnson's rule for equal first stages).
Given how many experts cross and how many present ones the CPU takes, swapping a heavier CPU expert
for a lighter accelerator one lowers the CPU's time by more than it raises the accelerator's, whose
time is nearly flat. So two thresholds over the loads describe near-optimal plans;
`HybriMoEScheduler` searches both and then mends what small, uneven cases leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from operator import attrgetter
from typing import NamedTuple, Protocol

from hybrimoe_plugin.config import SCHEDULERS
from hybrimoe_plugin.core import OFFLOADED, LayerPlan, Routed
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.costs import CostModel


class Scheduler(Protocol):
    """Decides one layer call."""

    name: str

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        """Assign every routed expert once; the link is busy with earlier transfers until
        `link_free_us`.
        """
        ...


class Slice(NamedTuple):
    """One expert on one lane (`cpu`, `accelerator` or `link`), in microseconds from the start of
    the call.
    """

    lane: str
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
    now = link_free_us
    for expert in plan.onload:
        slices.append(Slice("link", expert, now, now + costs.transfer_us))
        now += costs.transfer_us
        arrivals[expert] = now
    finish, busy = costs.accelerator_first_us if plan.accelerator else 0.0, 0.0
    for expert in plan.accelerator:
        start = max(finish, arrivals[expert])
        finish = start + costs.accelerator(by_id[expert].load)
        busy += finish - start
        slices.append(Slice("accelerator", expert, start, finish))
    cpu = 0.0
    for index, expert in enumerate(plan.cpu):
        start = cpu
        cpu += costs.cpu(by_id[expert].load) + (costs.cpu_first_us if index == 0 else 0.0)
        slices.append(Slice("cpu", expert, start, cpu))
    if plan.accelerator:
        busy += costs.accelerator_first_us
    return Simulation(
        max(finish, cpu), cpu, busy, len(plan.onload) * costs.transfer_us, tuple(slices)
    )


def assemble(
    routed: Sequence[Routed], on_accelerator: set[int], costs: CostModel, link_free_us: float = 0.0
) -> LayerPlan:
    """The best plan that gives exactly these experts to the accelerator."""
    present = sorted(
        (item for item in routed if item.expert in on_accelerator and item.ready_us != OFFLOADED),
        key=lambda item: (item.ready_us, -item.load, item.expert),
    )
    crossing = sorted(
        (item for item in routed if item.expert in on_accelerator and item.ready_us == OFFLOADED),
        key=lambda item: (-item.load, item.expert),
    )
    rest = sorted(
        (item for item in routed if item.expert not in on_accelerator),
        key=lambda i: (i.load, i.expert),
    )
    return _plan(rest, present, crossing, costs, link_free_us)


def _plan(
    cpu: Sequence[Routed],
    present: Sequence[Routed],
    crossing: Sequence[Routed],
    costs: CostModel,
    link_free_us: float,
) -> LayerPlan:
    """Build the plan from three ordered lists and predict its times."""
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
    return LayerPlan(
        tuple([item.expert for item in cpu]),
        tuple([item.expert for item in present]) + onload,
        onload,
        finish if finish >= cpu_us else cpu_us,
        cpu_us,
        busy,
        len(onload) * transfer,
    )


class CPUOnlyScheduler:
    """Everything on the CPU: the one-sided plan, and the only one without an accelerator."""

    name = "cpu_only"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        return _plan(routed, (), (), self._costs, link_free_us)


class AcceleratorOnlyScheduler:
    """Everything on the accelerator; every miss crosses the link (AdapMoE, mixtral-offloading)."""

    name = "accelerator_only"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        return assemble(routed, {item.expert for item in routed}, self._costs, link_free_us)


class StaticScheduler:
    """Hits on the accelerator, misses on the CPU (kTransformers)."""

    name = "static"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        hits = {item.expert for item in routed if item.ready_us != OFFLOADED}
        return assemble(routed, hits, self._costs, link_free_us)


class RatioScheduler:
    """Hits on the accelerator, a fixed share of the misses over the link, the others on the CPU
    (FreeToken).

    The share is `cpu / (cpu + transfer)` of one-token times, which is `pcie / (pcie + cpu)` of
    bandwidths.
    """

    name = "ratio"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        cpu, transfer = costs.cpu(1), costs.transfer_us
        self.share = cpu / (cpu + transfer) if cpu + transfer > 0 else 0.0

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        side = {item.expert for item in routed if item.ready_us != OFFLOADED}
        missing = sorted(
            (item for item in routed if item.ready_us == OFFLOADED),
            key=lambda i: (-i.load, i.expert),
        )
        side.update(item.expert for item in missing[: round(self.share * len(missing))])
        return assemble(routed, side, self._costs, link_free_us)


class GreedyScheduler:
    """The paper's three-queue simulation, as published (section 4.2); the plain twin of
    `HybriMoEScheduler`.
    """

    name = "greedy"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        costs = self._costs
        missing = sorted(
            (i for i in routed if i.ready_us == OFFLOADED), key=lambda i: (i.load, i.expert)
        )
        ready = sorted(
            (i for i in routed if i.ready_us != OFFLOADED), key=lambda i: (-i.load, i.expert)
        )
        cpu: list[Routed] = []
        done: list[Routed] = []
        onload: list[int] = []
        cpu_at, accelerator_at, link_at = (
            costs.cpu_first_us,
            costs.accelerator_first_us,
            link_free_us,
        )
        while missing or ready:
            cpu_next = missing[0] if missing else ready[-1]
            cpu_end = cpu_at + costs.cpu(cpu_next.load)
            link_end = link_at + costs.transfer_us if missing else OFFLOADED
            start = max(accelerator_at, ready[0].ready_us) if ready else OFFLOADED
            accelerator_end = start + costs.accelerator(ready[0].load) if ready else OFFLOADED
            if accelerator_end <= min(cpu_end, link_end):
                done.append(ready.pop(0))
                accelerator_at = accelerator_end
            elif cpu_end <= link_end:
                (missing if missing else ready).remove(cpu_next)
                cpu.append(cpu_next)
                cpu_at = cpu_end
            else:
                arrived = missing.pop()._replace(ready_us=link_end)
                onload.append(arrived.expert)
                link_at = link_end
                ready = sorted([*ready, arrived], key=lambda i: (-i.load, i.expert))
        # An expert can have crossed the link and then have been taken by an idle CPU: its transfer
        # was not needed.
        computed = {item.expert for item in done}
        plan = LayerPlan(
            tuple(item.expert for item in cpu),
            tuple(item.expert for item in done),
            tuple(expert for expert in onload if expert in computed),
            0.0,
            0.0,
            0.0,
            0.0,
        )
        run = simulate(plan, routed, costs, link_free_us)
        return plan._replace(
            makespan_us=run.makespan_us,
            cpu_us=run.cpu_us,
            accelerator_us=run.accelerator_us,
            link_us=run.link_us,
        )


class HybriMoEScheduler:
    """Two-threshold search for the smallest makespan, then exchanges in small uneven calls.

    Never worse than either one-sided plan, since both are among the candidates.
    Source: the goal of paper section 4.2; the search is ours.
    """

    name = "hybrimoe"

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        missing = [item for item in routed if item.ready_us == OFFLOADED]
        present = [item for item in routed if item.ready_us != OFFLOADED]
        load = routed[0].load if routed else 0
        even = True
        for item in routed:
            if item.load != load or 0.0 < item.ready_us < OFFLOADED:
                even = False
                break
        if even:
            return self._plan_even(missing, present, load, link_free_us)
        plan = self._plan_uneven(missing, sorted(present, key=_load, reverse=True), link_free_us)
        if any(item.ready_us > 0.0 for item in present):
            # Where weights are still in flight, it can pay to leave the late ones to the CPU
            # instead of the light ones.
            other = self._plan_uneven(missing, sorted(present, key=_soon_first), link_free_us)
            plan = min(plan, other, key=lambda candidate: candidate.makespan_us)
        if len(routed) <= _EXCHANGE_LIMIT:
            return _exchange(plan, routed, self._costs, link_free_us)
        return plan

    def _plan_even(
        self, missing: Sequence[Routed], present: Sequence[Routed], load: int, link_free_us: float
    ) -> LayerPlan:
        """All loads equal and nothing in flight, as in decode: only two counts are to be chosen, so
        this is exact.
        """
        costs = self._costs
        cpu, accelerator, transfer = costs.cpu(load), costs.accelerator(load), costs.transfer_us
        cpu_first, first = costs.cpu_first_us, costs.accelerator_first_us
        total, kept = len(missing) + len(present), len(present)
        best, best_crossing, best_kept = OFFLOADED, 0, kept
        gap, arrival = 0.0, link_free_us
        for crossing in range(len(missing) + 1):
            if crossing:
                arrival += transfer
                gap = max(gap, arrival - (crossing - 1) * accelerator)
            kept = len(present)
            while True:
                left = total - crossing - kept
                cpu_us = cpu_first + left * cpu if left else 0.0
                finish = (
                    max(first + kept * accelerator, gap) + crossing * accelerator
                    if kept or crossing
                    else 0.0
                )
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
        onload = [item.expert for item in missing[:best_crossing]]
        taken = best_crossing + best_kept
        left = total - taken
        return LayerPlan(
            tuple(
                [item.expert for item in missing[best_crossing:]]
                + [item.expert for item in present[best_kept:]]
            ),
            tuple([item.expert for item in present[:best_kept]] + onload),
            tuple(onload),
            best if total else 0.0,
            cpu_first + left * cpu if left else 0.0,
            first + taken * accelerator if taken else 0.0,
            best_crossing * transfer,
        )

    def _plan_uneven(
        self, missing: Sequence[Routed], present: Sequence[Routed], link_free_us: float
    ) -> LayerPlan:
        """Search both thresholds; `present` comes in the order in which the accelerator
        keeps them.
        """
        missing = sorted(missing, key=_load, reverse=True)
        crossing, kept = self._thresholds(missing, present, link_free_us)
        cpu = sorted([*missing[crossing:], *present[kept:]], key=_load)
        return _plan(
            cpu, sorted(present[:kept], key=_ready), missing[:crossing], self._costs, link_free_us
        )

    def _thresholds(
        self, missing: Sequence[Routed], present: Sequence[Routed], link_free_us: float
    ) -> tuple[int, int]:
        """(how many of `missing` cross the link, how many of `present` the accelerator keeps),
        heaviest first.

        The more experts cross, the fewer present ones the best plan leaves to the accelerator, so
        one sweep over both thresholds sees the optimum: O(missing + present).
        """
        costs, transfer = self._costs, self._costs.transfer_us
        cpu_us = [costs.cpu(item.load) for item in missing]
        accelerator_us = [costs.accelerator(item.load) for item in missing]
        cpu_left = sum(cpu_us) + costs.cpu_first_us
        present_cpu = [costs.cpu(item.load) for item in present]
        kept_finish = _prefix_finish(present, costs)
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
                ready = kept_finish[kept]
                finish = queued + (ready if ready >= gap else gap) if kept or crossing else 0.0
                cpu_time = (
                    cpu_left + moved_cpu if crossing < len(missing) or kept < len(present) else 0.0
                )
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
            while kept < len(present) and cpu_left + moved_cpu > queued + max(
                kept_finish[kept], gap
            ):
                moved_cpu -= present_cpu[kept]
                kept += 1
        return best_pair


_EXCHANGE_LIMIT = 12
_PAIR_LIMIT = 6
_EXCHANGE_ROUNDS = 3


# Sort keys without tuples where possible: a prefill call sorts hundreds of experts several times.
_load = attrgetter("load")
_ready = attrgetter("ready_us")


def _soon_first(item: Routed) -> tuple[float, int]:
    return item.ready_us, -item.load


def _prefix_finish(present: Sequence[Routed], costs: CostModel) -> list[float]:
    """Accelerator finish when it keeps the first n of `present`, for every n; launch included."""
    finish = costs.accelerator_first_us
    finishes = [finish]
    in_flight = False
    for count, item in enumerate(present, 1):
        if item.ready_us > 0.0:
            in_flight = True
        if in_flight:
            finish = costs.accelerator_first_us
            for kept in sorted(present[:count], key=_soon_first):
                finish = max(finish, kept.ready_us) + costs.accelerator(kept.load)
        else:
            finish += costs.accelerator(item.load)
        finishes.append(finish)
    return finishes


def _exchange(
    plan: LayerPlan, routed: Sequence[Routed], costs: CostModel, link_free_us: float
) -> LayerPlan:
    """Improve a plan by moving up to two experts each way, while that helps.

    Experts of equal load and arrival are interchangeable, so one of each kind is tried; candidates
    whose CPU time or accelerator work alone reaches the best makespan are not evaluated.
    """
    by_id = {item.expert: item for item in routed}
    for _ in range(_EXCHANGE_ROUNDS):
        best, best_side = plan.makespan_us * (1 - 1e-9), None
        here = [by_id[expert] for expert in plan.accelerator]
        there = [by_id[expert] for expert in plan.cpu]
        leave = [(), *((item,) for item in _kinds(here)), *_pairs(here)]
        join = [(), *((item,) for item in _kinds(there)), *_pairs(there)]
        for out in leave:
            cpu_out = plan.cpu_us + sum([costs.cpu(item.load) for item in out])
            work_out = plan.accelerator_us - sum([costs.accelerator(item.load) for item in out])
            for into in join:
                if not out and not into:
                    continue
                left = len(there) + len(out) - len(into)
                first = costs.cpu_first_us
                cpu_us = cpu_out - sum([costs.cpu(item.load) for item in into])
                cpu_us += (first if not there else 0.0) - (first if not left else 0.0)
                work = work_out + sum([costs.accelerator(item.load) for item in into])
                if cpu_us >= best or work >= best:
                    continue
                side = [item for item in here if item not in out] + list(into)
                makespan = max(cpu_us, _accelerator_finish(side, costs, link_free_us))
                if makespan < best:
                    best, best_side = makespan, side
        if best_side is None:
            return plan
        plan = assemble(routed, {item.expert for item in best_side}, costs, link_free_us)
    return plan


def _kinds(items: Sequence[Routed]) -> list[Routed]:
    """One expert of each (load, arrival)."""
    return list({(item.load, item.ready_us): item for item in items}.values())


def _pairs(items: Sequence[Routed]) -> list[tuple[Routed, Routed]]:
    """Pairs of different experts, for the smallest calls only: their number grows with the
    square.
    """
    if len(items) > _PAIR_LIMIT:
        return []
    found = {(a.load, a.ready_us, b.load, b.ready_us): (a, b) for a, b in combinations(items, 2)}
    return list(found.values())


def _accelerator_finish(side: Sequence[Routed], costs: CostModel, link_free_us: float) -> float:
    """When the accelerator has computed these experts in the best order."""
    if not side:
        return 0.0
    finish = costs.accelerator_first_us
    for item in sorted([item for item in side if item.ready_us != OFFLOADED], key=_soon_first):
        finish = max(finish, item.ready_us) + costs.accelerator(item.load)
    arrival = link_free_us
    for load in sorted([item.load for item in side if item.ready_us == OFFLOADED], reverse=True):
        arrival += costs.transfer_us
        finish = max(finish, arrival) + costs.accelerator(load)
    return finish


def exact_plan(routed: Sequence[Routed], costs: CostModel, link_free_us: float = 0.0) -> LayerPlan:
    """The optimum in the machine model by trying every set: the oracle of tests and of
    `eval.schedule`.

    Raises:
        ValueError: more than 16 experts.
    """
    if len(routed) > 16:
        raise ValueError(f"exact_plan tries every set: at most 16 experts, not {len(routed)}")
    ids = [item.expert for item in routed]
    plans = (
        assemble(routed, set(chosen), costs, link_free_us)
        for count in range(len(ids) + 1)
        for chosen in combinations(ids, count)
    )
    return min(plans, key=lambda plan: plan.makespan_us)


def make_scheduler(name: str, costs: CostModel, has_accelerator: bool) -> Scheduler:
    """The scheduler of that name; without an accelerator every plan is `cpu_only`.

    Raises:
        ConfigError: unknown name.
    """
    kinds = (
        HybriMoEScheduler,
        GreedyScheduler,
        RatioScheduler,
        StaticScheduler,
        AcceleratorOnlyScheduler,
        CPUOnlyScheduler,
    )
    by_name = {kind.name: kind for kind in kinds}
    if name not in by_name:
        raise ConfigError(f"scheduler: expected one of {', '.join(SCHEDULERS)}, found {name!r}")
    scheduler: Scheduler = by_name[name if has_accelerator else "cpu_only"](costs)
    return scheduler
