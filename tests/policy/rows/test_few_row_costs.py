"""Calls of a few rows are planned by costs of their own, all others as without these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tiny_experts
from controllers import LAYERS, books, make_controller, token

from hybrimoe_plugin.config import SCHEDULERS
from hybrimoe_plugin.core import OFFLOADED, Routed
from hybrimoe_plugin.policy.controller import Controller, Scored, loads
from hybrimoe_plugin.policy.costs import CostCurve, CostModel
from hybrimoe_plugin.policy.prefetch import Prediction, make_prefetcher
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.step import Rows

IDS = ((0, 1), (2, 3), (4, 5))
ROWS = Rows(np.arange(3), np.ones(3, bool))
SLOW = tiny_experts.costs(cpu_us=50_000.0)
"""The CPU is no use in a call of a few rows."""


def costs_with(few_rows: CostModel) -> CostModel:
    costs = tiny_experts.costs(cpu_us=10.0)
    costs.few_rows = few_rows
    return costs


def cpu_experts(made: Controller, ids: Sequence[Sequence[int]], rows: Rows | None) -> int:
    chosen = np.array(ids)
    scored = Scored(chosen, np.full(chosen.shape, 0.5, np.float32), None, rows)
    return len(made.begin(0, loads(chosen), len(chosen), 0.0, scored).plan.cpu)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_plans_both_kinds_as_one_made_for_each(scheduler: str) -> None:
    routed = [
        Routed(expert, 1 + expert % 2, OFFLOADED if expert % 3 else 0.0) for expert in range(7)
    ]
    costs = costs_with(SLOW)
    both = make_scheduler(scheduler, costs, True)
    plain = make_scheduler(scheduler, tiny_experts.costs(cpu_us=10.0), True)
    slow = make_scheduler(scheduler, SLOW, True)
    assert both.for_rows(few=False).plan(routed) == plain.plan(routed)
    assert both.for_rows(few=True).plan(routed) == slow.plan(routed)
    assert plain.for_rows(few=True) is plain


def test_only_calls_of_a_few_rows_follow_their_costs() -> None:
    for ids, rows, some in ((IDS, ROWS, False), (IDS, None, True), (IDS[:1], None, True)):
        made = make_controller(costs=costs_with(SLOW))
        assert bool(cpu_experts(made, ids, rows)) == some


def test_layers_on_the_cpu_take_as_long_as_their_rows_do() -> None:
    made = make_controller(costs=costs_with(SLOW))
    made.pool.on_cpu = frozenset({0})
    chosen = np.array(IDS)
    scored = Scored(chosen, np.full(chosen.shape, 0.5, np.float32), None, ROWS)
    assert made.begin(0, loads(chosen), 3, 0.0, scored).plan.cpu_us > 6 * 50_000.0


def test_single_tokens_and_prompts_are_decided_as_without_them() -> None:
    made = [
        make_controller(costs=costs)
        for costs in (tiny_experts.costs(cpu_us=10.0), costs_with(SLOW))
    ]
    for one in made:
        one.warm_start()
        rng, now_us = np.random.default_rng(0), 0.0
        for tokens in (40, 1, 1, 1, 3, 1, 1):
            for layer in range(LAYERS):
                scored = token(rng, tokens)
                step = one.begin(layer, loads(scored.ids), tokens, now_us, scored)
                one.look_ahead(step, [(layer + 1, {0: 1, 5: 1})][: LAYERS - 1 - layer], now_us)
                one.finish(step)
                now_us += step.plan.makespan_us + 200.0
    assert books(made[0]) == books(made[1])


def test_prefetches_for_a_few_rows_weigh_their_costs() -> None:
    costs = costs_with(tiny_experts.costs(cpu_us=0.0, first_us=0.0))
    costs.cpu = CostCurve((1,), (50_000.0,))
    prefetcher = make_prefetcher("impact", make_scheduler("hybrimoe", costs, True))
    assert prefetcher is not None
    routed = (Routed(0, 1, 0.0), Routed(1, 1, OFFLOADED))
    for few, chosen in ((False, 1), (True, 0)):
        prediction = Prediction(1, 1, routed, {1: 1.0}, few)
        assert len(prefetcher.choose([prediction], 4)) == chosen
