"""What follows the launches leaves the books that planning each call first would leave."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
from controllers import EXPERTS, LAYERS, TOP_K, books, make_controller, token
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe_plugin.config import BUDGETS, CACHES, PREFETCHERS, SCHEDULERS
from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.policy.controller import Controller, Move, Step, loads
from hybrimoe_plugin.policy.costs import CostCurve
from hybrimoe_plugin.policy.step import Lenders

passes_of = st.lists(st.sampled_from([1, 1, 1, 5]), min_size=2, max_size=10)


@settings(max_examples=60)
@given(
    passes=passes_of,
    seed=st.integers(0, 2**31),
    quota=st.integers(1, 7),
    transfer_us=st.sampled_from([50.0, 300.0]),
    scheduler=st.sampled_from(SCHEDULERS),
    cache=st.sampled_from(CACHES),
    budget=st.sampled_from(BUDGETS),
    prefetch=st.sampled_from(PREFETCHERS),
)
def test_the_books_are_those_of_the_plain_twin(
    passes: list[int], seed: int, quota: int, transfer_us: float, **choices: str
) -> None:
    deferred = make_controller(quota, transfer_us, **choices)
    plain = make_controller(quota, transfer_us, **choices)
    plain.deferred = False
    found = []
    for made in (deferred, plain):
        found.append(run(made, passes, np.random.default_rng(seed)))
    assert found[0] == found[1]


def run(made: Controller, passes: list[int], rng: np.random.Generator) -> list[object]:
    """The plans, moves and books of some passes with random routing and predictions."""
    made.warm_start()
    found: list[object] = []
    now_us = 0.0
    for tokens in passes:
        for layer in range(LAYERS):
            routing = token(rng, tokens)
            step = made.begin(layer, loads(routing.ids), tokens, now_us, routing)
            found.append(step)
            for expert, _ in made.stale(step):
                made.withdraw(layer, expert)
            later = range(layer + 1, LAYERS)
            ahead = [(other, loads(rng.integers(0, EXPERTS, (tokens, 2)))) for other in later]
            found.append(made.look_ahead(step, ahead, now_us))
            made.finish(step)
            found.append(books(made))
            now_us += step.plan.makespan_us + 100.0
    return found


def test_a_call_is_noted_once_whoever_asks_for_it() -> None:
    made = make_controller(2, prefetch="off")
    made.warm_start()
    step = made.begin(0, {0: 1, 5: 1}, 1, 0.0)
    assert made.counters.calls == 0, "behind the launches"
    made.note(step)
    made.look_ahead(step, [], 0.0)
    made.finish(step)
    assert made.counters.calls == 1
    assert made.counters.activations == 2


def test_an_abandoned_call_is_not_noted() -> None:
    made = make_controller(2)
    made.warm_start()
    step = made.begin(0, {0: 1, 1: 1}, 1, 0.0)
    made.recover({})
    assert not any(made.pool.cached)
    made.note(step)
    assert made.counters.calls == 0


def test_nothing_is_looked_for_where_everything_is_there() -> None:
    made = make_controller(EXPERTS)
    made.warm_start()
    assert not made.looks_ahead
    step = made.begin(0, {0: 1, 1: 1}, 1, 0.0)
    assert made.look_ahead(step, [(1, {2: 1})], 0.0) == []
    made.finish(step)
    made.recover({})
    assert made.looks_ahead, "most were lost"


def fast_accelerator(quota: int, **choices: str) -> Controller:
    """A controller whose plans leave hits to the accelerator."""
    made = make_controller(quota, transfer_us=150.0, accelerator_us=5.0, **choices)
    assert made.all_hit_on_accelerator(TOP_K)
    made.warm_start()
    return made


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
        layer, routing = turn % LAYERS, token(rng)
        guess = rng.choice(EXPERTS, TOP_K, replace=False).tolist()
        step = asked.begin(layer, loads(routing.ids), 1, now_us, routing)
        resident = all(item.ready_us == 0.0 for item in step.routed)
        hits += resident
        if resident:
            other = unasked.hit(layer, routing.ids[0].tolist(), now_us, routing)
        else:
            other = unasked.begin(layer, loads(routing.ids), 1, now_us, routing)
        assert in_router_order(other) == in_router_order(step)
        assert rest(asked, step, guess, now_us) == rest(unasked, other, guess, now_us)
        assert books(asked) == books(unasked)
        now_us += step.plan.makespan_us + 100.0
    assert hits or quota < 4


def test_a_hit_on_an_expert_that_came_early_counts() -> None:
    made = fast_accelerator(3)
    slot = made.residency.admit(0, 3, Lenders(range(LAYERS)), 1e9)
    assert slot is not None
    made.residency.expect(Move(0, 3, slot, 0.0, 500.0))
    resident = next(expert for expert in made.pool.cached[0] if expert != 3)
    step = made.hit(0, [resident, 3], 400.0)
    made.finish(step)
    assert step.plan.accelerator == (resident, 3)
    assert made.counters.calls == 1 and made.counters.cache_hits == 2
    assert made.residency.arriving(0) == {3: 500.0}, "the books' own time of arrival"


def test_a_hit_on_an_expert_that_lost_its_slot_counts() -> None:
    made = fast_accelerator(3)
    first, second, *_ = made.pool.cached[0]
    made.residency.evict(ExpertRef(0, first))
    made.finish(made.hit(0, [first, second], 0.0))
    assert made.counters.calls == 1 and made.counters.cache_hits == 2
    assert first not in made.pool.cached[0]
    made.pool.check_integrity()


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
