"""The best two thresholds of an uneven call: how many misses cross, and how many hits stay.

Why two thresholds are enough: given how many experts cross the link and how many present ones the
CPU takes, swapping a heavier CPU expert for a lighter accelerator one lowers the CPU's time by more
than it raises the accelerator's. So the heaviest misses cross, and the accelerator keeps the
heaviest present experts. That holds as long as the accelerator's advantage, the CPU's time over its
own, grows with load. Where it does not, the order of that advantage is tried as well.

All sums over experts are made at C speed, before the search. Two bounds leave it few counts:

- With all hits on the accelerator, each further miss that crosses helps for as long as the
  accelerator is the earlier side. So the search begins where it becomes the later one.
- It ends where the arrivals alone are as late as the best plan.

An expert in flight can hold up the accelerator. Where it does, the same search is made again with
that expert on the CPU, and where very many are in flight with the latest others as well. `WEIGHED`
bounds both how often that is done and what a search takes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import NamedTuple

from hybrimoe_plugin.core import LayerPlan, Routed
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule.machine_model import load_of, ready_of

ROUNDING = 1e-9
"""Share of a time below which a difference is rounding."""

WEIGHED = 32
"""Experts in flight of which any number may be left to the accelerator; of twice as many, every
second number. Links have fewer on their way at once, but odd settings could keep a plan waiting.
"""


class Split(NamedTuple):
    """Who computes what, and how long both sides take."""

    makespan_us: float
    cpu_us: float
    accelerator_us: float
    """Without waits."""
    crossing: int
    """How many of `missing` cross the link, from its end."""
    kept: int
    """How many of `present` the accelerator computes, from its end."""
    missing: list[Routed]
    present: list[Routed]
    in_flight: bool
    """Whether any expert of the call is."""
    late: list[Routed]
    """Experts in flight that the CPU computes in any case; not in `present`."""

    def sides(self) -> tuple[list[Routed], list[Routed], list[Routed]]:
        """(what the CPU computes, what the accelerator does from slots, what crosses), ordered."""
        missing, present = self.missing, self.present
        misses, hits = len(missing) - self.crossing, len(present) - self.kept
        on_cpu = missing[:misses]
        if hits or self.late:
            on_cpu += present[:hits]
            on_cpu += self.late
            on_cpu.sort(key=load_of)
        # The heaviest first, and those in slots by arrival.
        in_slots, crossing = present[hits:], missing[misses:]
        in_slots.reverse()
        crossing.reverse()
        if self.in_flight:
            in_slots.sort(key=ready_of)
        crossing.sort(key=load_of, reverse=True)
        return on_cpu, in_slots, crossing

    def plan(self, transfer_us: float) -> LayerPlan:
        """Build the plan."""
        on_cpu, in_slots, crossing = self.sides()
        onload = tuple([item[0] for item in crossing])
        return LayerPlan(
            tuple([item[0] for item in on_cpu]),
            tuple([item[0] for item in in_slots]) + onload,
            onload,
            self.makespan_us,
            self.cpu_us,
            self.accelerator_us,
            self.crossing * transfer_us,
        )


def best_split(
    missing: list[Routed],
    present: list[Routed],
    in_flight: bool,
    costs: CostModel,
    link_free_us: float,
) -> Split:
    """The split with the smallest makespan among those by two thresholds.

    Mutates: sorts both lists by load. Of equal loads the CPU takes the last ones first.

    Args:
        present: resident and in-flight experts.
        in_flight: whether any of them is in flight.
        link_free_us: the link is busy with earlier transfers until then.
    """
    for items in (missing, present):
        items.reverse()
        items.sort(key=load_of)
    missing_loads = [item[1] for item in missing]
    loads = [item[1] for item in present]
    times = _Times(costs, sorted({*missing_loads, *loads}))
    crossing = _crossing(missing_loads, times, link_free_us, by_load=True)
    best = _by_order(missing, present, loads, in_flight, crossing, times)
    if times.advantage_grows():
        return best
    missing, present = sorted(missing, key=times.advantage), sorted(present, key=times.advantage)
    missing_loads = [item[1] for item in missing]
    loads = [item[1] for item in present]
    crossing = _crossing(missing_loads, times, link_free_us, by_load=False)
    other = _by_order(missing, present, loads, in_flight, crossing, times)
    return other if other.makespan_us < best.makespan_us * (1 - ROUNDING) else best


class _Times:
    """What the experts of one call take.

    Args:
        loads: ascending.
    """

    __slots__ = ("accelerator", "costs", "cpu")

    def __init__(self, costs: CostModel, loads: Sequence[int]) -> None:
        cpu, accelerator = costs.cpu, costs.accelerator
        self.costs = costs
        self.cpu = {load: cpu(load) for load in loads}
        self.accelerator = {load: accelerator(load) for load in loads}

    def advantage_grows(self) -> bool:
        """Whether the CPU's time over the accelerator's is never less for a greater load."""
        cpu_before, before = 0.0, 1.0
        for cpu_us, us in zip(self.cpu.values(), self.accelerator.values(), strict=True):
            if cpu_us * before < cpu_before * us * (1 - ROUNDING):
                return False
            cpu_before, before = cpu_us, us
        return True

    def advantage(self, item: Routed) -> tuple[float, int]:
        """Sort key: the CPU's time of an expert over the accelerator's, then its load."""
        return self.cpu[item.load] / max(self.accelerator[item.load], ROUNDING), item.load


class _Crossing(NamedTuple):
    """Sums over the missing experts, whose last ones cross the link."""

    left: Sequence[float]
    """Time of the first n on the CPU, with the extra time of a first expert."""
    queued: Sequence[float]
    """Time of the last n on the accelerator."""
    shortest: Sequence[float]
    """The shortest time on the accelerator among the last n + 1."""
    link_free_us: float
    transfer_us: float


def _crossing(loads: list[int], times: _Times, link_free_us: float, by_load: bool) -> _Crossing:
    """The sums over the missing experts.

    Args:
        loads: of the missing experts; reversed.
        by_load: whether they ascend.
    """
    costs, accelerator = times.costs, times.accelerator
    left = list(accumulate(map(times.cpu.__getitem__, loads), initial=costs.cpu_first_us))
    loads.reverse()
    spent = [accelerator[load] for load in loads]
    queued = list(accumulate(spent, initial=0.0))
    shortest = spent if by_load else list(accumulate(spent, min))
    return _Crossing(left, queued, shortest, link_free_us, costs.transfer_us)


def _by_order(
    missing: list[Routed],
    present: list[Routed],
    loads: list[int],
    in_flight: bool,
    crossing: _Crossing,
    times: _Times,
) -> Split:
    """The best split in which the CPU takes the first ones of either list.

    Args:
        loads: of `present`; reversed.
    """
    cpu, accelerator = times.cpu, times.accelerator
    left, queued = crossing.left, crossing.queued
    best: Split | None = None
    late: list[Routed] = []
    others = (sum([item[2] > 0.0 for item in present]) - 1) // WEIGHED if in_flight else 0
    while True:
        on_cpu_us = sum([cpu[item[1]] for item in late]) if late else 0.0
        moved = list(accumulate(map(cpu.__getitem__, loads), initial=on_cpu_us))
        loads.reverse()
        spent = [accelerator[load] for load in loads]
        work = list(accumulate(spent, initial=times.costs.accelerator_first_us))
        finishes = _with_waits(work, spent, present[::-1]) if in_flight else work
        makespan_us, count, kept = _thresholds(crossing, finishes, moved, bool(late))
        misses, hits = len(missing) - count, len(present) - kept
        split = Split(
            makespan_us,
            left[misses] + moved[hits] if misses or hits or late else 0.0,
            work[kept] + queued[count] if kept or count else 0.0,
            count,
            kept,
            missing,
            present,
            in_flight,
            late.copy(),
        )
        if best is None or makespan_us < best.makespan_us * (1 - ROUNDING):
            best = split
        if not in_flight:
            return best
        held_up = _held_up_by(split, times, queued[count])
        if held_up is None:
            return best
        present = [item for item in present if item is not held_up]
        late.append(held_up)
        if others:
            coming = sorted([item for item in present if item[2] > 0.0], key=ready_of)[-others:]
            present = [item for item in present if item not in coming]
            late += coming
        loads = [item[1] for item in present]


def _with_waits(
    work: Sequence[float], spent: Sequence[float], order: Sequence[Routed]
) -> list[float]:
    """When the accelerator has computed the first n of `order`, for every n.

    Infinite for what is not weighed.

    Args:
        work: what it takes without experts in flight, launch included.
        spent: on each one.
    """
    finishes = list(work)
    coming: list[tuple[float, float]] = []
    left = sum([item[2] > 0.0 for item in order])
    stride = 1 + (left - 1) // WEIGHED
    end = 0.0  # of what is in flight
    for count, item in enumerate(order, start=1):
        if item[2] > 0.0:
            insort(coming, (item[2], spent[count - 1]))
            left -= 1
            if left % stride:
                end = inf
            else:
                end = 0.0
                for ready_us, us in coming:
                    end = (end if end >= ready_us else ready_us) + us
        if finishes[count] < end:
            finishes[count] = end
    return finishes


def _held_up_by(split: Split, times: _Times, queued_us: float) -> Routed | None:
    """The expert in flight that may hold up better plans: the next to try on the CPU.

    Either the makespan waits for it, or it is on the CPU and others only because it is.
    """
    hits = len(split.present) - split.kept
    behind_us = queued_us
    for item in sorted(split.present[hits:], key=ready_of, reverse=True):
        if item[2] <= 0.0:
            break
        behind_us += times.accelerator[item[1]]
        if item[2] + behind_us >= split.makespan_us * (1 - ROUNDING):
            return item
    dropped = [item for item in split.present[1:hits] if item[2] > 0.0]
    return max(dropped, key=ready_of) if dropped else None


def _thresholds(
    crossing: _Crossing, finishes: Sequence[float], moved: Sequence[float], cpu_begins: bool
) -> tuple[float, int, int]:
    """The best of all pairs of counts.

    Crossing experts are computed in descending time. So what the accelerator has computed by each
    arrival grows ever more slowly, and it waits longest for the first arrival or for the last.

    Args:
        finishes: when the accelerator has computed n present experts, launch included.
        moved: of n present experts on the CPU, and of what it computes in any case.
        cpu_begins: whether it computes anything in any case.

    Returns:
        (makespan, how many missing experts cross, how many present ones stay).
    """
    left, queued, shortest, free_us, transfer_us = crossing
    misses, hits = len(left) - 1, len(finishes) - 1
    first_us = free_us + transfer_us
    ready, on_cpu = finishes[hits], moved[0]

    # With all hits on the accelerator: the fewest misses with which it is not the earlier side.
    low, high = 0, misses
    while low < high:
        count = (low + high) >> 1
        wait = ready
        if count:
            last = free_us + count * transfer_us - queued[count] + shortest[count - 1]
            wait = max(ready, first_us, last)
        if wait + queued[count] < left[misses - count] + on_cpu:
            low = count + 1
        else:
            high = count
    # All on the CPU, where the accelerator does not even begin; with fewer misses than `low` those.
    best, best_count, best_kept = left[misses] + moved[hits], 0, 0
    if low and left[misses - low + 1] + on_cpu < best:
        best, best_count, best_kept = left[misses - low + 1] + on_cpu, low - 1, hits
    kept = hits
    for count in range(low, misses + 1):
        work, wait = queued[count], 0.0
        if count:
            last = free_us + count * transfer_us - work + shortest[count - 1]
            wait = last if last >= first_us else first_us
            if wait + work >= best:
                break
        cpu_left = left[misses - count]
        while True:
            ready = finishes[kept]
            end = work + (ready if ready >= wait else wait)
            cpu_us = cpu_left + moved[hits - kept]
            makespan = end if end >= cpu_us else cpu_us
            if makespan < best:
                best, best_count, best_kept = makespan, count, kept
            # With more misses crossing the CPU has less to do: it takes these present ones too.
            if end <= cpu_us or not kept:
                break
            kept -= 1
    if not cpu_begins:  # All on the accelerator, where the CPU does not even begin.
        wait = finishes[hits]
        if misses:
            last = free_us + misses * transfer_us - queued[misses] + shortest[misses - 1]
            wait = max(wait, first_us, last)
        if wait + queued[misses] < best:
            best, best_count, best_kept = wait + queued[misses], misses, hits
    return best, best_count, best_kept
