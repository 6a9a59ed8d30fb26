"""The books of a call that the accelerator computed unasked are those of a planned call."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
from controllers import EXPERTS, LAYERS, TOP_K, make_controller
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe_plugin.config import CACHES, PREFETCHERS, SCHEDULERS
from hybrimoe_plugin.policy.controller import Controller, Move, Scored, Step, loads
from hybrimoe_plugin.policy.costs import CostCurve


def fast_accelerator(quota: int, **choices: str) -> Controller:
    """A controller whose plans leave hits to the accelerator."""
    made = make_controller(quota, transfer_us=150.0, accelerator_us=5.0, **choices)
    assert made.all_hit_on_accelerator(TOP_K)
    made.warm_start()
    return made


def scored(rng: np.random.Generator) -> Scored:
    """One token's routing; the first experts are chosen most often."""
    logits = rng.normal(size=(1, EXPERTS)) - np.arange(EXPERTS)
    scores = np.exp(logits).astype(np.float32)
    scores /= scores.sum()
    ids = np.argsort(-scores, axis=1)[:, :TOP_K]
    return Scored(ids, np.take_along_axis(scores, ids, axis=1), scores)


def rest(made: Controller, step: Step, guess: list[int], now_us: float) -> list[Move]:
    """What follows the launches."""
    layer = step.layer
    later = range(layer + 1, LAYERS)
    moves = made.look_ahead(step, [(other, dict.fromkeys(guess, 1)) for other in later], now_us)
    made.finish(step)
    return moves


def in_router_order(step: Step) -> Step:
    """Some schedulers sort what the accelerator computes; what it computes is what counts."""
    on_accelerator = set(step.plan.accelerator)
    order = [item.expert for item in step.routed if item.expert in on_accelerator]
    return step._replace(plan=step.plan._replace(accelerator=tuple(order)))


def books(made: Controller) -> tuple[object, ...]:
    """All that later decisions depend on."""
    counters = made.counters.snapshot()
    counters.plan_us = 0.0
    pool = made.pool
    return (
        [list(cached.items()) for cached in pool.cached],
        pool._free,
        pool._in_flight,
        pool._leased,
        made.residency.worth.tolist(),
        made.residency._arrivals,
        made.cache.ranks.tolist(),
        made.link.free_us,
        made.link.layer_us,
        made.link.demand_share,
        made.prefetch_record.by_distance,
        counters,
    )


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    quota=st.integers(2, 7),
    scheduler=st.sampled_from([name for name in SCHEDULERS if name != "cpu_only"]),
    cache=st.sampled_from(CACHES),
    prefetch=st.sampled_from(PREFETCHERS),
)
def test_a_hit_leaves_the_books_that_begin_leaves(seed: int, quota: int, **choices: str) -> None:
    asked = fast_accelerator(quota, **choices)
    unasked = deepcopy(asked)
    rng = np.random.default_rng(seed)
    now_us = hits = 0.0
    for turn in range(8 * LAYERS):
        layer, routing = turn % LAYERS, scored(rng)
        guess = rng.choice(EXPERTS, TOP_K, replace=False).tolist()
        step = asked.begin(layer, loads(routing.ids), 1, now_us, routing)
        resident = all(item.ready_us == 0.0 for item in step.routed)
        other = unasked.hit(layer, routing.ids[0].tolist(), now_us, routing)
        assert (other is not None) == resident, "only a call whose experts are all there"
        hits += resident
        if other is None:
            other = unasked.begin(layer, loads(routing.ids), 1, now_us, routing)
        assert in_router_order(other) == in_router_order(step)
        assert rest(asked, step, guess, now_us) == rest(unasked, other, guess, now_us)
        assert books(asked) == books(unasked)
        now_us += step.plan.makespan_us + 100.0
    assert hits or quota < 4


def test_an_expert_that_is_still_coming_is_no_hit() -> None:
    made = fast_accelerator(3)
    slot = made.residency.admit(0, 3, range(LAYERS), 1e9)
    assert slot is not None
    made.residency.expect(Move(0, 3, slot, 0.0, 500.0))
    resident = next(expert for expert in made.pool.cached[0] if expert != 3)
    assert made.hit(0, [resident, 3], 400.0) is None
    step = made.hit(0, [resident, 3], 500.0)
    assert step is not None
    assert step.plan.accelerator == (resident, 3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_whether_all_hits_stay_on_the_accelerator_follows_the_costs(scheduler: str) -> None:
    made = make_controller(4, accelerator_us=5.0, scheduler=scheduler)
    made.warm_start()
    for accelerator_us in (5.0, 5000.0, 5.0):
        made.costs.accelerator = CostCurve([1], [accelerator_us])
        expected = not made.begin(0, {0: 1, 1: 1}, 1, 0.0).plan.cpu
        assert made.all_hit_on_accelerator(2) == expected
        assert made.all_hit_on_accelerator(2) == expected
    made.take_between_layers(1.0)
    assert made.all_hit_on_accelerator(2) == expected
