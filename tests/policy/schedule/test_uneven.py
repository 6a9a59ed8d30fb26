"""Plans of calls whose loads differ, against the optimum and against the plain twin."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import operations

from eval.policies.calls import few_row_call
from hybrimoe_plugin.core import OFFLOADED, Routed
from hybrimoe_plugin.policy.costs import CostCurve, CostModel
from hybrimoe_plugin.policy.schedule import (
    HybriMoEScheduler,
    exact_plan,
    optimum_us,
    simulate,
    thresholds,
)
from hybrimoe_plugin.policy.schedule.baselines import (
    AcceleratorOnlyScheduler,
    CPUOnlyScheduler,
    StaticScheduler,
)
from hybrimoe_plugin.policy.schedule.frontier import better_split
from hybrimoe_plugin.policy.schedule.hybrimoe import SLOPE, SMALL
from hybrimoe_plugin.policy.schedule.thresholds import WEIGHED
from hybrimoe_plugin.replay.profile_files import load_profile, shipped

ROUNDING = 1 + 1e-8
NEAR = 2e-3
"""Stated share: what thresholds may lose where the accelerator's times rise with load a little."""

times = st.floats(1.0, 2000.0)
growth = st.floats(1.0, 2.0)
arrivals = st.sampled_from([0.0, OFFLOADED]) | st.floats(1.0, 1500.0)


@st.composite
def costs_of_any_shape(draw: st.DrawFn) -> CostModel:
    """Also of accelerators that take their time for each token."""
    cpu, accelerator = draw(times), draw(times)
    steep = draw(st.booleans())
    rise = draw(growth) if steep else 1.0
    return CostModel(
        CostCurve((1, 2, 16), (cpu, cpu * draw(growth), cpu * draw(st.floats(2, 10)))),
        draw(st.floats(0, 500)),
        CostCurve((1, 2), (accelerator, accelerator * rise)),
        draw(st.floats(0, 50)),
        draw(times),
    )


@st.composite
def calls(draw: st.DrawFn, least: int, most: int) -> tuple[list[Routed], float]:
    """A call, and when the link is free: never before what is in flight has arrived."""
    count = draw(st.integers(least, most))
    routed = [Routed(expert, draw(st.integers(1, 6)), draw(arrivals)) for expert in range(count)]
    coming = [item.ready_us for item in routed if item.ready_us != OFFLOADED]
    return routed, max(coming, default=0.0) + draw(st.sampled_from([0.0, 300.0]))


@given(call=calls(0, 30), costs=costs_of_any_shape(), weighed=st.sampled_from([2, WEIGHED]))
def test_each_expert_once_and_times_as_simulated(
    call: tuple[list[Routed], float], costs: CostModel, weighed: int
) -> None:
    routed, link_free = call
    scheduler = HybriMoEScheduler(costs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "WEIGHED", weighed)
        plan = scheduler.plan(routed, link_free)
        makespan_us = scheduler.makespan_us(routed, link_free)
    assert sorted(plan.cpu + plan.accelerator) == [item.expert for item in routed]
    offloaded = {item.expert for item in routed if item.ready_us == OFFLOADED}
    assert set(plan.onload) == offloaded & set(plan.accelerator)
    run = simulate(plan, routed, costs, link_free)
    assert plan.makespan_us == pytest.approx(run.makespan_us, rel=1e-9)
    assert plan.cpu_us == pytest.approx(run.cpu_us, rel=1e-9)
    assert plan.accelerator_us == pytest.approx(run.accelerator_us, rel=1e-9)
    assert makespan_us == plan.makespan_us


@given(call=calls(2, 30), costs=costs_of_any_shape(), weighed=st.sampled_from([2, WEIGHED]))
def test_never_worse_than_one_sided_plans(
    call: tuple[list[Routed], float], costs: CostModel, weighed: int
) -> None:
    routed, link_free = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "WEIGHED", weighed)
        ours = HybriMoEScheduler(costs).plan(routed, link_free).makespan_us
    for other in (CPUOnlyScheduler, AcceleratorOnlyScheduler, StaticScheduler):
        assert ours <= other(costs).plan(routed, link_free).makespan_us * ROUNDING


@given(call=calls(1, 8), costs=costs_of_any_shape())
@settings(max_examples=60)
def test_small_calls_are_optimal(call: tuple[list[Routed], float], costs: CostModel) -> None:
    """To a thousandth: below it the accelerator's times count as equal."""
    routed, link_free = call
    best = exact_plan(routed, costs, link_free).makespan_us
    assert HybriMoEScheduler(costs).plan(routed, link_free).makespan_us <= best * (1 + SLOPE)


@given(call=calls(1, 8), costs=costs_of_any_shape())
@settings(max_examples=60)
def test_the_frontier_holds_the_optimum(call: tuple[list[Routed], float], costs: CostModel) -> None:
    routed, link_free = call
    best = exact_plan(routed, costs, link_free).makespan_us
    assert optimum_us(routed, costs, link_free) == pytest.approx(best, rel=1e-8)
    assert better_split(routed, costs, link_free, best) is None


@given(call=calls(2, 30), costs=costs_of_any_shape())
def test_never_worse_than_the_sweep(call: tuple[list[Routed], float], costs: CostModel) -> None:
    """But for the thousandth of small calls. With experts in flight either can be luckier."""
    routed, link_free = call
    routed = [
        item if item.ready_us == OFFLOADED else item._replace(ready_us=0.0) for item in routed
    ]
    ours = HybriMoEScheduler(costs).plan(routed, link_free)
    swept = HybriMoEScheduler(costs, swept=True).plan(routed, link_free)
    rounding = ROUNDING if len(routed) > SMALL else 1 + SLOPE
    assert ours.makespan_us <= swept.makespan_us * rounding


@given(call=calls(2, 30), costs=costs_of_any_shape(), order=st.randoms())
def test_the_order_of_experts_does_not_matter(
    call: tuple[list[Routed], float], costs: CostModel, order: random.Random
) -> None:
    routed, link_free = call
    shuffled = list(routed)
    order.shuffle(shuffled)
    scheduler = HybriMoEScheduler(costs)
    found = scheduler.makespan_us(shuffled, link_free)
    assert found == pytest.approx(scheduler.makespan_us(routed, link_free), rel=1e-9)


@pytest.mark.parametrize("profile", shipped())
def test_few_rows_are_near_the_optimum_on_every_profile(profile: str) -> None:
    found = load_profile(profile)
    costs = found.costs(found.spec)
    rng = np.random.default_rng(1)
    scheduler = HybriMoEScheduler(costs)
    gaps = []
    for turn in range(40):
        rows = (2, 4, 8, 16, 32)[turn % 5]
        ids = np.stack([rng.permutation(64)[:6] for _ in range(rows)])
        cached = set(rng.permutation(64)[: (16, 32, 48)[turn % 3]].tolist())
        coming = turn % 4 if turn % 2 else 0
        call = few_row_call(rng, ids, cached, coming, costs.transfer_us)
        best = optimum_us(call.routed, costs, call.link_free_us)
        gaps.append(scheduler.plan(call.routed, call.link_free_us).makespan_us / best - 1)
    assert min(gaps) >= -1e-9
    assert max(gaps) <= NEAR
    assert statistics.mean(gaps) <= NEAR / 5


def test_experts_that_cost_the_cpu_nothing_begin_it_all_the_same() -> None:
    costs = CostModel(CostCurve((1,), (0.0,)), 1e6, CostCurve((1,), (5.0,)), 10.0, 30.0)
    call = [Routed(expert, 1 + expert % 2, 50.0 + expert) for expert in range(SMALL + 8)]
    for routed in (call, call[:2]):
        found = HybriMoEScheduler(costs).plan(routed)
        run = simulate(found, routed, costs, 0.0)
        assert found.makespan_us == pytest.approx(run.makespan_us)
        assert not found.cpu


def test_an_expert_goes_where_it_gains_most_at_its_load() -> None:
    """The CPU takes heavy experts where it computes many tokens cheaply and the other side not."""
    cpu, accelerator = CostCurve((1, 4), (100.0, 110.0)), CostCurve((1, 4), (25.0, 100.0))
    costs = CostModel(cpu, 0.0, accelerator, 0.0, 1e6)
    heavy = [Routed(expert, 4, 0.0) for expert in range(8)]
    light = [Routed(expert, 1, 0.0) for expert in range(8, 16)]
    plan = HybriMoEScheduler(costs).plan(heavy + light)
    loads = {item.expert: item.load for item in heavy + light}
    assert {loads[expert] for expert in plan.cpu} == {4}
    swept = HybriMoEScheduler(costs, swept=True).plan(heavy + light)
    assert plan.makespan_us < 0.9 * swept.makespan_us


def test_a_late_expert_in_flight_does_not_hold_up_the_others() -> None:
    costs = CostModel(CostCurve((1, 4), (100.0, 130.0)), 0.0, CostCurve((1,), (10.0,)), 0.0, 1e6)
    late = Routed(0, 4, 5000.0)
    others = [Routed(expert, 1 + expert % 3, 0.0) for expert in range(1, 20)]
    plan = HybriMoEScheduler(costs).plan([late, *others])
    assert 0 in plan.cpu
    assert plan.makespan_us < 200.0


def all_in_flight(count: int) -> list[Routed]:
    """Each arrives long after the one before it, so that each may hold up the others."""
    return [Routed(expert, 1 + expert % 3, 50.0 * (expert + 1)) for expert in range(count)]


QUICK_CPU = CostModel(CostCurve((1, 4), (10.0, 13.0)), 0.0, CostCurve((1,), (10.0,)), 0.0, 1e6)


def test_work_grows_with_the_experts_in_flight_not_with_their_square() -> None:
    def work(count: int) -> int:
        return operations(lambda: HybriMoEScheduler(QUICK_CPU).plan(all_in_flight(count)))

    assert work(6 * WEIGHED) < 2.5 * work(3 * WEIGHED)


@pytest.mark.parametrize("count", [WEIGHED // 2, WEIGHED])
def test_what_a_link_can_have_in_flight_is_weighed_in_full(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = HybriMoEScheduler(QUICK_CPU).plan(all_in_flight(count))
    monkeypatch.setattr(thresholds, "WEIGHED", 2 * count)
    assert HybriMoEScheduler(QUICK_CPU).plan(all_in_flight(count)) == found


@pytest.mark.parametrize("apart", [1.0, 6.0])
@pytest.mark.parametrize("cpu_us", [10.0, 50.0, 200.0])
def test_more_than_that_is_weighed_nearly_as_well(
    cpu_us: float, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = CostCurve((1, 4), (cpu_us, 1.3 * cpu_us))
    costs = CostModel(cpu, 0.0, CostCurve((1,), (10.0,)), 0.0, 1e6)
    routed = [item._replace(ready_us=apart * item.ready_us) for item in all_in_flight(4 * WEIGHED)]
    found = HybriMoEScheduler(costs).plan(routed).makespan_us
    monkeypatch.setattr(thresholds, "WEIGHED", len(routed))
    assert found <= 1.05 * HybriMoEScheduler(costs).plan(routed).makespan_us
