"""Schedules: complete, never worse than one-sided, and close to the exact optimum."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import tiny_experts
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_plugin.core import OFFLOADED, Routed
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.costs import CostCurve, CostModel
from hybrimoe_plugin.policy.schedule import (
    HybriMoEScheduler,
    exact_plan,
    make_scheduler,
    simulate,
)
from hybrimoe_plugin.policy.schedule.baselines import (
    AcceleratorOnlyScheduler,
    CPUOnlyScheduler,
    GreedyScheduler,
    StaticScheduler,
)

times = st.floats(1.0, 2000.0)
ready = st.sampled_from([0.0, OFFLOADED]) | st.floats(1.0, 1500.0)


@st.composite
def cost_models(draw: st.DrawFn) -> CostModel:
    cpu, accelerator = draw(times), draw(times)
    return CostModel(
        CostCurve((1, 2, 16), (cpu, cpu * draw(st.floats(1, 2)), cpu * draw(st.floats(2, 10)))),
        draw(st.floats(0, 500)),
        CostCurve((1, 64), (accelerator, accelerator * draw(st.floats(1, 2)))),
        draw(st.floats(0, 50)),
        draw(times),
    )


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Routed], float]:
    count = draw(st.integers(0, 9))
    routed = [Routed(expert, draw(st.integers(1, 20)), draw(ready)) for expert in range(count)]
    in_flight = [item.ready_us for item in routed if item.ready_us != OFFLOADED]
    return routed, max(in_flight, default=0.0)


KINDS = [
    HybriMoEScheduler,
    GreedyScheduler,
    StaticScheduler,
    AcceleratorOnlyScheduler,
    CPUOnlyScheduler,
]


@pytest.mark.parametrize("kind", KINDS)
@given(call=calls(), costs=cost_models())
def test_each_expert_once_and_times_as_simulated(
    kind: type, call: tuple[list[Routed], float], costs: CostModel
) -> None:
    routed, link_free = call
    plan = kind(costs).plan(routed, link_free)
    assert sorted(plan.cpu + plan.accelerator) == [item.expert for item in routed]
    offloaded = {item.expert for item in routed if item.ready_us == OFFLOADED}
    assert set(plan.onload) == offloaded & set(plan.accelerator)
    run = simulate(plan, routed, costs, link_free)
    for planned, happened in zip(plan[3:], run[:4], strict=True):
        assert planned == pytest.approx(happened, rel=1e-9, abs=1e-6)


@given(call=calls(), costs=cost_models())
def test_never_worse_than_one_sided_plans(
    call: tuple[list[Routed], float], costs: CostModel
) -> None:
    routed, link_free = call
    ours = HybriMoEScheduler(costs).plan(routed, link_free).makespan_us
    for other in (CPUOnlyScheduler, AcceleratorOnlyScheduler, StaticScheduler):
        assert ours <= other(costs).plan(routed, link_free).makespan_us * (1 + 1e-9) + 1e-6


def random_case(rng: np.random.Generator, even: bool) -> tuple[list[Routed], CostModel, float]:
    cpu, accelerator = rng.uniform(50, 1500), rng.uniform(20, 600)
    costs = CostModel(
        CostCurve((1, 2, 16), (cpu, cpu * rng.uniform(1, 2), cpu * rng.uniform(2, 10))),
        rng.uniform(0, 500),
        CostCurve((1, 64), (accelerator, accelerator * rng.uniform(1, 2))),
        rng.uniform(0, 50),
        rng.uniform(100, 2000),
    )
    loads = [
        1 if even else int(rng.choice([1, 1, 2, 3, 5, 8, 20])) for _ in range(rng.integers(1, 10))
    ]
    states = [rng.choice([0, 0, OFFLOADED, OFFLOADED, rng.uniform(1, 1500)]) for _ in loads]
    routed = [
        Routed(index, load, float(state))
        for index, (load, state) in enumerate(zip(loads, states, strict=True))
    ]
    return (
        routed,
        costs,
        max([item.ready_us for item in routed if item.ready_us != OFFLOADED], default=0.0),
    )


@pytest.mark.parametrize("even", [True, False])
def test_gap_to_the_exact_optimum(even: bool) -> None:
    rng = np.random.default_rng(7)
    gaps = []
    for _ in range(200):
        routed, costs, link_free = random_case(rng, even)
        best = exact_plan(routed, costs, link_free).makespan_us
        gaps.append(HybriMoEScheduler(costs).plan(routed, link_free).makespan_us / best - 1)
    assert statistics.mean(gaps) <= 0.01
    assert max(gaps) <= 0.05


def test_many_experts_keep_within_the_lower_bound() -> None:
    costs = tiny_experts.costs()
    rng = np.random.default_rng(0)
    for _ in range(20):
        loads = rng.integers(1, 60, 256).tolist()
        routed = [
            Routed(expert, load, 0.0 if expert % 4 == 0 else OFFLOADED)
            for expert, load in enumerate(loads)
        ]
        plan = HybriMoEScheduler(costs).plan(routed)
        assert sorted(plan.cpu + plan.accelerator) == list(range(256))
        assert plan.makespan_us <= GreedyScheduler(costs).plan(routed).makespan_us * 1.001


def test_a_transfer_is_used_only_where_it_pays() -> None:
    routed = [Routed(0, 1, OFFLOADED), Routed(1, 1, OFFLOADED)]
    slow = HybriMoEScheduler(tiny_experts.costs(transfer_us=5000)).plan(routed)
    fast = HybriMoEScheduler(tiny_experts.costs(transfer_us=50, accelerator_us=20)).plan(routed)
    assert slow.onload == ()
    assert len(fast.onload) == 2


def test_unknown_scheduler_is_refused_and_no_accelerator_means_cpu() -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        make_scheduler("fastest", tiny_experts.costs(), True)
    assert make_scheduler("hybrimoe", tiny_experts.costs(), False).name == "cpu_only"


EXAMPLE = CostModel(CostCurve((1, 2), (20.0, 40.0)), 0.0, CostCurve((1,), (10.0,)), 0.0, 40.0)
"""The machine of the worked examples: 20 us a token, 10 us an expert, 40 us a transfer."""


def test_the_worked_example() -> None:
    """As in the docstring of `schedule/hybrimoe.py`: experts A, B, C, D."""
    routed = [
        Routed(0, 4, 0.0),
        Routed(1, 1, 0.0),
        Routed(2, 3, OFFLOADED),
        Routed(3, 1, OFFLOADED),
    ]
    plan = HybriMoEScheduler(EXAMPLE).plan(routed)
    run = simulate(plan, routed, EXAMPLE)
    assert list(run.slices) == [
        ("link", 2, 0.0, 40.0),
        ("accelerator", 0, 0.0, 10.0),
        ("accelerator", 1, 10.0, 20.0),
        ("accelerator", 2, 40.0, 50.0),
        ("cpu", 3, 0.0, 20.0),
    ]
    spans = {}
    for kind in (CPUOnlyScheduler, AcceleratorOnlyScheduler, StaticScheduler):
        spans[kind.name] = kind(EXAMPLE).plan(routed).makespan_us
    assert plan.makespan_us == 50.0
    assert spans == {"cpu_only": 180.0, "accelerator_only": 90.0, "static": 80.0}


@pytest.mark.parametrize("kind", KINDS)
@given(missing=st.integers(0, 9), present=st.integers(0, 9), load=st.integers(1, 3))
def test_makespans_are_those_of_plans(kind: type, missing: int, present: int, load: int) -> None:
    """Also where they were remembered and the costs have changed since."""
    costs = tiny_experts.costs()
    scheduler = kind(costs)
    ready = [OFFLOADED] * missing + [0.0] * present
    routed = [Routed(expert, load, ready_us) for expert, ready_us in enumerate(ready)]
    late = [item._replace(ready_us=70.0) for item in routed[missing:][:1]]
    coming = [*late, *routed[:missing]]
    for transfer_us in (300.0, 20.0):
        costs.transfer_us = transfer_us
        planned = scheduler.plan(routed).makespan_us
        assert scheduler.makespan_us(routed) == planned
        assert scheduler.even_makespan_us(missing, present, load) == planned
        assert scheduler.makespan_us(routed, 50.0) == scheduler.plan(routed, 50.0).makespan_us
        assert scheduler.makespan_us(coming) == scheduler.plan(coming).makespan_us
