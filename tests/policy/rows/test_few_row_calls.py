"""The decision loop and calls of a few rows: steps of several conversations, not prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from controllers import EXPERTS, LAYERS, books, make_controller, token
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, Routed
from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.policy.controller import Controller, Scored, Step, loads
from hybrimoe_plugin.policy.prefetch import Prediction
from hybrimoe_plugin.policy.prefetch.confidence import Confidence
from hybrimoe_plugin.policy.prefetch.record import SLACK
from hybrimoe_plugin.policy.residency import KEPT
from hybrimoe_plugin.policy.step import FEW_ROWS, IdleTime, Move, Rows

GIVES_WAY = 16
"""Calls of a layer within which an ended conversation's experts have lost their slots."""


def call(
    made: Controller, layer: int, ids: Sequence[Sequence[int]], now_us: float, rows: Rows | None
) -> Step:
    chosen = np.array(ids)
    weights = np.full(chosen.shape, 0.5, np.float32)
    scored = Scored(chosen, weights, None, rows)
    step = made.begin(layer, loads(chosen), len(chosen), now_us, scored)
    made.look_ahead(step, [], now_us)
    made.finish(step)
    return step


def one_pass(
    made: Controller, ids: Sequence[Sequence[int]], now_us: float, rows: Rows | None
) -> float:
    """Every layer chooses the same; gives when the pass has ended."""
    for layer in range(LAYERS):
        now_us += call(made, layer, ids, now_us, rows).plan.makespan_us + 500.0
    return now_us


def conversations(*owners: int) -> Rows:
    return Rows(np.array(owners), np.ones(len(owners), bool))


def test_an_ended_conversation_gives_way() -> None:
    made = make_controller(quota=4)
    made.warm_start()
    now_us = 0.0
    for _ in range(40):
        now_us = one_pass(made, [[0, 1], [2, 3]], now_us, conversations(1, 2))
    assert all({0, 1, 2, 3} <= cached.keys() for cached in made.pool.cached)
    for _ in range(GIVES_WAY):
        now_us = one_pass(made, [[4, 5], [2, 3]], now_us, conversations(3, 2))
    assert all({2, 3, 4, 5} == cached.keys() for cached in made.pool.cached)


def test_a_long_tree_leaves_a_conversation_of_one_row_its_slots() -> None:
    """Fifteen rows of a draft and one of a conversation: both keep what they always need."""
    made = make_controller(quota=4)
    made.warm_start()
    rows = Rows(np.array([1, *[2] * 15]), np.array([True, True, *[False] * 14]))
    rng = np.random.default_rng(0)
    now_us = 0.0
    for _ in range(60):
        drafted = rng.permuted(np.tile(np.arange(4, EXPERTS), (14, 1)), axis=1)[:, :2]
        ids = [[0, 1], [2, 3], *drafted.tolist()]
        now_us = one_pass(made, ids, now_us, rows)
    assert all({0, 1} <= cached.keys() for cached in made.pool.cached)


@pytest.mark.parametrize(
    ("tokens", "rows", "many"),
    [(1, None, False), (4, None, True), (4, conversations(0, 1, 2, 3), False)],
)
def test_rows_tell_a_step_from_a_prompt(tokens: int, rows: Rows | None, many: bool) -> None:
    made = make_controller()
    step = call(made, 0, [[0, 1]] * tokens, 0.0, rows)
    assert step.many == many


def test_more_than_a_few_rows_are_a_prompt() -> None:
    made = make_controller(budget="shared")
    count = FEW_ROWS + 1
    for _ in range(2):
        one_pass(made, [[0, 1]] * count, 0.0, conversations(*range(count)))
    assert made.loans.streak.active


def test_steps_of_a_few_rows_are_no_streak_of_prompts() -> None:
    made = make_controller(budget="shared")
    for _ in range(3):
        one_pass(made, [[0, 1], [2, 3]], 0.0, conversations(0, 1))
    assert not made.loans.streak.active
    assert not made.loans.streak.loads.any()


@settings(max_examples=25, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**31), min_size=2, max_size=8))
def test_rows_of_one_token_change_no_decision(seeds: list[int]) -> None:
    said, plain = make_controller(), make_controller()
    for made, rows in ((said, conversations(5)), (plain, None)):
        made.warm_start()
        now_us = 0.0
        for seed in seeds:
            rng = np.random.default_rng(seed)
            for layer in range(LAYERS):
                scored = token(rng)._replace(rows=rows)
                step = made.begin(layer, loads(scored.ids), 1, now_us, scored)
                made.look_ahead(step, [(layer + 1, {0: 1, 5: 1})][: LAYERS - 1 - layer], now_us)
                made.finish(step)
                now_us += step.plan.makespan_us + 200.0
    assert books(said) == books(plain)


class TestVerified:
    DRAFTED = Rows(np.zeros(3, np.int64), np.array([True, False, False]))
    IDS = ((0, 1), (2, 3), (4, 5))

    def test_slots_are_worth_what_the_corrected_ranks_say(self) -> None:
        made = make_controller(quota=4)
        made.warm_start()
        now_us = 0.0
        for _ in range(10):
            now_us = one_pass(made, self.IDS, now_us, self.DRAFTED)
            before = made.cache.ranks.copy()
            made.verified(np.array([True, True, False]))
            assert (made.cache.ranks != before).any()
            for layer, cached in enumerate(made.pool.cached):
                for expert in cached:
                    if not made.pool.in_flight(layer, expert):
                        assert (
                            made.residency.worth[layer, expert] == made.cache.ranks[layer, expert]
                        )

    def test_a_pass_that_ended_early_is_forgotten(self) -> None:
        made = make_controller()
        call(made, 0, self.IDS, 0.0, self.DRAFTED)
        made.recover({})
        before = made.cache.ranks.copy()
        made.verified(np.ones(3, bool))
        np.testing.assert_array_equal(made.cache.ranks, before)

    def test_another_number_of_rows_is_refused(self) -> None:
        made = make_controller()
        one_pass(made, self.IDS, 0.0, self.DRAFTED)
        with pytest.raises(InputError, match="3 rows"):
            made.verified(np.ones(2, bool))

    @pytest.mark.parametrize("cache", ["lru", "mrs", "static"])
    def test_fixed_rules_know_of_no_drafts(self, cache: str) -> None:
        made = make_controller(cache=cache)
        one_pass(made, self.IDS, 0.0, self.DRAFTED)
        before = made.cache.ranks.copy()
        made.verified(np.ones(3, bool))
        np.testing.assert_array_equal(made.cache.ranks, before)


def test_what_is_predicted_for_more_rows_is_trusted_more_where_it_comes_true_more() -> None:
    trust = Confidence()
    light, heavy = Routed(1, 1, OFFLOADED), Routed(2, 3, OFFLOADED)
    for number in range(40):
        trust.predicted(0, 1, [light, heavy], many=False, few=True)
        trust.check(0, [heavy] if number % 2 else [light, heavy])
    found = trust.predicted(0, 1, [light, heavy], many=False, few=True)
    assert found[2] > found[1] + 0.2


def prefetched(monkeypatch: pytest.MonkeyPatch, above: bool, transfer_us: float) -> set[int]:
    """Layers that lose an expert to a prefetch for layer 1 behind a crowded call of layer 0.

    Args:
        above: whether layer 2 holds more experts than its quota, at layer 1's cost.
    """
    made = make_controller(quota=4, transfer_us=transfer_us, prefetch="expected")
    made.warm_start()
    if above:
        victim = next(iter(made.pool.cached[1]))
        made.residency.replace(ExpertRef(1, victim), 2, 7)
        made.residency.settle([Move(2, 7, 0, 0.0, 0.0)])
    held = [set(cached) for cached in made.pool.cached]
    ids = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    scored = Scored(ids, np.full(ids.shape, 0.5, np.float32), None, conversations(0, 1, 2, 3))
    step = made.begin(0, loads(ids), len(ids), 0.0, scored)
    assert step.few and step.crowded
    made.note(step)
    made.residency.worth[1] = KEPT
    gain = made.idle_prefetch._gain
    monkeypatch.setattr(gain, "prefetch_us", lambda *_: 1e9)
    wanted = next(expert for expert in range(EXPERTS) if expert not in held[1])
    routed = (Routed(wanted, 4, OFFLOADED),)
    made.idle_prefetch.send(
        step, [Prediction(1, 1, routed, {wanted: 1.0})], IdleTime(made.link.free_us, 1e4)
    )
    return {layer for layer in range(LAYERS) if held[layer] - set(made.pool.cached[layer])}


def test_a_late_prefetch_only_evens_out_what_crowded_layers_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert prefetched(monkeypatch, above=False, transfer_us=2e4) == set()
    assert prefetched(monkeypatch, above=True, transfer_us=2e4) == {2}
    assert prefetched(monkeypatch, above=False, transfer_us=1.0) == {2}


@pytest.mark.parametrize("rows", [1, 2])
def test_of_equally_worthy_experts_the_fullest_layer_loses_one(rows: int) -> None:
    """For a single token the first layer does."""
    made = make_controller(quota=4)
    made.warm_start()
    made.residency.replace(ExpertRef(0, next(iter(made.pool.cached[0]))), 2, 7)
    made.residency.settle([Move(2, 7, 0, 0.0, 0.0)])
    worth = made.residency.worth
    worth[worth != KEPT] = 0.001
    few = rows > 1
    victim = made.residency.replaced(1, made.residency.lenders(1, False, few))
    assert victim is not None and victim.layer == (2 if few else 0)
    worth[1][worth[1] != KEPT] = 0.0
    victim = made.residency.replaced(1, made.residency.lenders(1, False, few))
    assert victim is not None and victim.layer == 1, "what experts are worth comes first"


@pytest.mark.parametrize("rows", [1, 2])
def test_unused_prefetches_hold_back_those_of_single_tokens_only(rows: int) -> None:
    made = make_controller(quota=4, prefetch="expected")
    made.prefetch_record.issued = 100.0
    few = conversations(*range(rows)) if rows > 1 else None
    ids = np.array([[0, 1]] * rows)
    scored = Scored(ids, np.full(ids.shape, 0.5, np.float32), None, few)
    step = made.begin(0, loads(ids), rows, 0.0, scored)
    least = made.idle_prefetch._least_confidence(step)
    assert (least == SLACK) == (rows > 1)
