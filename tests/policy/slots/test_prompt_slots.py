"""Prompts: prefetches in lent staging slots, demand loads that stay, and how debts are paid."""

from __future__ import annotations

import numpy as np
import pytest
from controllers import EXPERTS, LAYERS, make_controller

from hybrimoe_plugin.policy.controller import Controller, Scored, loads
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.policy.step import Rows, Step

ALL = dict.fromkeys(range(EXPERTS), 20)


def make(staging: int = 6, **choices: str) -> Controller:
    """Slots for 2 of 8 experts a layer, a fast link, and ranks that fall with the number."""
    made = make_controller(2, 50.0, accelerator_us=5.0, prefetch="expected", **choices)
    made.residency.pool = SlotPool([2] * LAYERS, staging, made.pool.shared)
    made.cache.ranks[:] = np.linspace(0.9, 0.1, EXPERTS)
    made.warm_start()
    return made


def call(made: Controller, layer: int, predict: bool = True, tokens: int = 160) -> Step:
    """A prompt's call that needs all experts and predicts the same of the next layer."""
    now_us = made.link.free_us
    step = made.begin(layer, ALL if tokens > 1 else {0: 1}, tokens, now_us)
    predicted = [(layer + 1, ALL)] if predict and layer + 1 < LAYERS else []
    made.look_ahead(step, predicted, now_us)
    return step


def test_a_prefetch_of_a_prompt_evicts_nothing() -> None:
    made = make()
    before = [dict(cached) for cached in made.pool.cached]
    call(made, 0)
    assert made.counters.prefetches >= 2
    assert made.pool.debt(1) == 2, "all but the fewest staging slots"
    assert made.pool.unlent_staging == 4
    for layer, cached in enumerate(before):
        assert cached.items() <= made.pool.cached[layer].items()
    made.pool.check_integrity()


def test_a_layer_gives_back_what_was_lent_to_it_when_it_has_run() -> None:
    made = make(staging=12)
    for layer in range(LAYERS):
        step = call(made, layer)
        if layer:
            assert made.pool.debt(layer) >= 2
            assert len(made.pool.cached[layer]) >= 4
        made.finish(step)
        assert made.pool.debt(layer) == 0
        made.pool.check_integrity()
    assert made.pool.unlent_staging == made.pool.staging
    assert sum(map(len, made.pool.cached)) == 2 * LAYERS


def test_a_debt_is_paid_by_an_answer_too() -> None:
    """The model stopped behind the first layer, so the prefetches of the second are never used."""
    made = make()
    made.finish(call(made, 0))
    assert made.pool.debt(1) == 2
    made.finish(call(made, 0, tokens=1))
    made.finish(call(made, 1, tokens=1))
    assert made.pool.debt(1) == 0
    made.pool.check_integrity()


def test_a_recovered_pool_has_no_debts() -> None:
    made = make()
    made.finish(call(made, 0))
    held = {}
    for layer, cached in enumerate(made.pool.cached):
        for expert, slot in cached.items():
            held[slot] = (layer, expert)
    made.recover(held)  # type: ignore[arg-type]
    assert made.pool.unlent_staging == made.pool.staging
    made.pool.check_integrity()
    made.finish(call(made, 1))
    made.pool.check_integrity()


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_layer_keeps_the_experts_that_rank_highest(prompts: int) -> None:
    """More demand loads than staging slots, heaviest first: what ranks high is sent last, and stays
    though it has the fewest tokens.
    """
    made = make(staging=4)
    loads = {expert: 20 - expert for expert in range(EXPERTS)}
    made.cache.ranks[:] = np.linspace(0.1, 0.9, EXPERTS)
    for _ in range(prompts):
        for layer in range(LAYERS):
            step = made.begin(layer, loads, 160, made.link.free_us)
            made.finish(step)
            made.pool.check_integrity()
    assert [set(cached) for cached in made.pool.cached] == [{6, 7}] * LAYERS


def test_a_prompts_postponed_fill_may_send_what_a_few_rows_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The expert lies in a staging slot, and has been given one of its own."""
    made = make(staging=4)
    monkeypatch.setattr(made.cache, "observe", lambda layer, scored: None)
    made.cache.ranks[0] = np.linspace(0.1, 0.9, EXPERTS)
    made.cache.ranks[1:] = 0.0
    made.residency.revalue_all()
    made.cache_fill.postponed = {0: [7]}
    ids = np.arange(EXPERTS).reshape(4, 2)
    rows = Rows(np.arange(4), np.ones(4, bool))
    scored = Scored(ids, np.full(ids.shape, 0.5, np.float32), None, rows)
    step = made.begin(0, loads(ids), 4, 0.0, scored)
    assert step.moves[-1].expert == 7
    assert [move.expert for move in made.look_ahead(step, [], 0.0)] == [7]
    made.finish(step)
    made.pool.check_integrity()
    assert made.pool.cached[0].keys() == {5, 6, 7}


def test_without_shared_slots_prompts_keep_nothing() -> None:
    """The plain twin."""
    made = make(budget="layer")
    made.cache.ranks[:] = np.linspace(0.1, 0.9, EXPERTS)
    for layer in range(LAYERS):
        step = call(made, layer, predict=False)
        assert step.moves
        made.finish(step)
    assert not any(made.pool.debt(layer) for layer in range(LAYERS))
    assert made.pool.unlent_staging == made.pool.staging
    assert [set(cached) for cached in made.pool.cached] == [{0, 1}] * LAYERS
