"""The decision loop: shared slots stay within the budget, the link's bookkeeping holds, trust is
earned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tiny_experts
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_plugin.config import BUDGETS, CACHES, PREFETCHERS, SCHEDULERS, Settings
from hybrimoe_plugin.core import OFFLOADED, ExpertRef, Routed
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.confidence import Confidence
from hybrimoe_plugin.policy.controller import Controller, Move, loads
from hybrimoe_plugin.policy.idle_link import CREDIT, USED_SHARE
from hybrimoe_plugin.policy.link_time import Idle
from hybrimoe_plugin.policy.prefetch import Prediction, PrefetchRequest, make_prefetcher
from hybrimoe_plugin.policy.prompt_row import PromptRow
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def controller(
    quota: int = 2, transfer_us: float = 300.0, accelerator_us: float = 50.0, **choices: str
) -> Controller:
    settings = Settings.of(choices)
    costs = tiny_experts.costs(transfer_us=transfer_us, accelerator_us=accelerator_us)
    scheduler = make_scheduler(settings.scheduler, costs, True)
    return Controller(
        SlotPool([quota] * LAYERS, 4, settings.budget == "shared"),
        costs,
        scheduler,
        scheduler,
        make_cache(settings.cache, LAYERS, EXPERTS, TOP_K, settings),
        make_prefetcher(settings.prefetch, scheduler, costs),
        100,
    )


calls = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2**31)), min_size=1, max_size=12)


@given(
    passes=calls,
    quota=st.integers(0, 3),
    transfer_us=st.sampled_from([50.0, 300.0, 5000.0]),
    scheduler=st.sampled_from(SCHEDULERS),
    cache=st.sampled_from(CACHES),
    budget=st.sampled_from(BUDGETS),
    prefetch=st.sampled_from(PREFETCHERS),
)
def test_invariants_hold_whatever_is_configured(
    passes: list[tuple[int, int]], quota: int, transfer_us: float, **choices: str
) -> None:
    made = controller(quota, transfer_us, **choices)
    made.warm_start()
    now_us = 0.0
    for tokens, seed in passes:
        rng = np.random.default_rng(seed)
        for layer in range(LAYERS):
            scores = rng.dirichlet(np.ones(EXPERTS), size=tokens).astype(np.float32)
            ids = np.argsort(-scores, axis=1)[:, :TOP_K]
            made.learn(layer, ids, np.take_along_axis(scores, ids, axis=1), scores)
            step = made.begin(layer, loads(ids), tokens, now_us)
            free_us = made.link_free_us
            ahead = [
                (later, loads(rng.integers(0, EXPERTS, ids.shape)))
                for later in range(layer + 1, LAYERS)
            ]
            moves = made.look_ahead(step, ahead, now_us)
            for move in moves:
                assert move.start_us >= free_us - 1e-6, "transfers do not overlap on the link"
                free_us = move.end_us
            assert made.link_free_us == pytest.approx(max(free_us, made.link_free_us))
            made.finish(step)
            made.pool.check_integrity()
            assert sum(len(layer) for layer in made.pool.cached) <= quota * LAYERS
            now_us += step.plan.makespan_us + 100.0
    counts = made.counters
    assert counts.prefetches >= counts.prefetches_used + counts.prefetches_wasted
    assert counts.experts_cpu + counts.experts_accelerator == counts.activations


def test_layers_share_slots_where_they_may() -> None:
    """One layer always needs other experts, the others always the same two."""
    sizes = {}
    for budget in BUDGETS:
        made = controller(3, budget=budget, prefetch="off")
        made.warm_start()
        rng, now_us = np.random.default_rng(0), 0.0
        for _ in range(60):
            for layer in range(LAYERS):
                chosen = rng.choice(5, 2, replace=False) if layer == 0 else np.array([0, 1])
                ids = chosen[None].astype(np.int64)
                made.learn(layer, ids, np.full((1, 2), 0.5, np.float32), None)
                step = made.begin(layer, loads(ids), 1, now_us)
                made.look_ahead(step, [], now_us)
                made.finish(step)
                now_us += step.plan.makespan_us + 500.0
        sizes[budget] = [len(layer) for layer in made.pool.cached]
    assert sizes["layer"] == [3, 3, 3]
    assert sizes["shared"][0] == 5, "all that the first layer needs"
    assert sum(sizes["shared"]) == 9


def test_nothing_is_prefetched_on_predictions_that_never_come_true() -> None:
    made = controller(2)
    made.warm_start()
    rng, now_us = np.random.default_rng(0), 0.0
    for _ in range(40):
        for layer in range(LAYERS):
            ids = rng.choice(4, 2, replace=False)[None].astype(np.int64)
            made.learn(layer, ids, np.full((1, 2), 0.5, np.float32), None)
            step = made.begin(layer, loads(ids), 1, now_us)
            wrong = {int(expert): 1 for expert in rng.choice(np.arange(4, 8), 2, replace=False)}
            made.look_ahead(step, [(layer + 1, wrong)] if layer + 1 < LAYERS else [], now_us)
            made.finish(step)
            now_us += step.plan.makespan_us + 500.0
    assert made.counters.prefetches == 0


def spare_moves(
    worth: float,
    transfer_us: float = 300.0,
    issued: float = 0.0,
    accelerator_us: float = 600.0,
    hits: int = 50,
) -> list[tuple[int, int]]:
    """What is prefetched for layer 1 when it is predicted to need expert 7 alone, which the CPU
    computes as fast.
    """
    made = controller(2, transfer_us, accelerator_us, prefetch="expected")
    made._issued = issued
    made.warm_start()
    assert made.pool.slot_of(1, 7) is None
    ids = np.array([[0, 1]])
    made.learn(0, ids, np.full((1, 2), 0.5, np.float32), None)
    step = made.begin(0, loads(ids), 1, 0.0)
    for turn in range(50):
        made.confidence.predicted(1, 1, routed(7), many=False)
        made.confidence.check(1, {7} if turn * hits // 50 < (turn + 1) * hits // 50 else ())
    made._worth[made._worth < np.inf] = worth
    moves = made.look_ahead(step, [(1, {7: 1})], 0.0)
    return [(move.layer, move.expert) for move in moves if move.layer == 1]


def test_spare_time_sends_what_the_cpu_would_hide() -> None:
    assert spare_moves(worth=0.1) == [(1, 7)]


def test_spare_time_takes_no_slot_that_may_be_needed() -> None:
    assert spare_moves(worth=0.6) == []


def test_there_is_no_spare_time_on_a_busy_link() -> None:
    assert spare_moves(worth=0.1, transfer_us=5000.0) == []


def test_doubtful_ones_wait_while_prefetches_stay_unused() -> None:
    assert spare_moves(worth=0.1, issued=CREDIT / USED_SHARE - 0.1, hits=25) == [(1, 7)]
    assert spare_moves(worth=0.1, issued=CREDIT / USED_SHARE + 0.1, hits=25) == []


def test_sure_ones_need_not_wait_but_must_be_the_surer_the_fewer_were_used() -> None:
    assert spare_moves(worth=0.1, issued=CREDIT / USED_SHARE + 0.1) == [(1, 7)]
    assert spare_moves(worth=0.1, issued=50.0) == []


def late_gain_us(behind: dict[int, int]) -> float:
    """Gain of a sure prefetch for layer 1 that ends after layer 1 has run, when layer 2 is to need
    `behind`.
    """
    made = controller(2, 2000.0, prefetch="expected")
    step = made.begin(0, {}, 4, 0.0)
    made._layer_us = 1000.0
    made._demand = [0.0, 0.0]
    ahead = [(1, {7: 1}), (2, behind)]
    sure = [
        Prediction(
            layer,
            layer,
            tuple(Routed(e, load, OFFLOADED) for e, load in need.items()),
            dict.fromkeys(need, 1.0),
        )
        for layer, need in ahead
    ]
    request = PrefetchRequest(ExpertRef(1, 7), 1, 1000.0, 1.0)
    return made._gain_us(step, sure, Idle(0.0, 500.0), request)


def test_a_late_prefetch_pays_for_the_layer_behind_its_own() -> None:
    assert late_gain_us({0: 1}) > late_gain_us({0: 64})


def test_the_second_prefetch_is_weighed_beside_the_first() -> None:
    """Two equal misses: with the first under way their layer is done sooner, so the layer behind
    wants the link.
    """
    made = controller(2, 2000.0, prefetch="expected")
    step = made.begin(0, {}, 4, 0.0)
    made._layer_us, made._demand, made.link_free_us = 1000.0, [0.0, 0.0], 2000.0
    idle = Idle(0.0, 1500.0)
    ahead = Prediction(1, 1, (Routed(6, 4, OFFLOADED), Routed(7, 4, OFFLOADED)), {6: 1.0, 7: 1.0})
    behind = Prediction(2, 2, (Routed(0, 64, OFFLOADED),), {0: 1.0})
    coming = made._coming(ahead, Move(1, 6, 0, 0.0, 2000.0), idle)
    assert [item.ready_us for item in coming.routed] == [500.0, OFFLOADED]
    request = PrefetchRequest(ExpertRef(1, 7), 1, 100.0, 1.0)
    assert made._gain_us(step, [coming, behind], idle, request) < made._gain_us(
        step, [ahead, behind], idle, request
    )


def test_nothing_is_queued_that_would_start_after_the_next_call() -> None:
    """Else a link that no later call wants is free to everybody, and the queue grows
    without end.
    """
    for busy_us, sent in ((0.0, True), (1e5, False)):
        made = controller(2, prefetch="expected")
        made.warm_start()
        for _ in range(50):
            made.confidence.predicted(1, 1, routed(0, 1, ready_us=0.0), many=False)
            made.confidence.check(1, {0, 1})
        ids = np.array([[4, 5]])
        made.learn(0, ids, np.full((1, 2), 0.5, np.float32), None)
        made.link_free_us = busy_us or 1e5
        step = made.begin(0, loads(ids), 1, 0.0)
        assert step.plan.cpu == (4, 5)
        made._demand = [0.0, 0.0]
        made.link_free_us = busy_us
        made.look_ahead(step, [(1, {0: 1, 1: 1})], 0.0)
        assert (made.link_free_us > busy_us) == sent


def test_decode_makes_up_for_fills_that_a_prompt_had_no_time_for() -> None:
    made = controller(2, prefetch="off")
    made.warm_start()
    now_us = 0.0
    for layer in range(LAYERS):
        ids = np.array([[4, 5]] * 3)
        made.learn(layer, ids, np.full((3, 2), 0.5, np.float32), None)
        made.link_free_us = now_us + 1e6
        step = made.begin(layer, loads(ids), 3, now_us)
        made.look_ahead(step, [], now_us)
        made.finish(step)
        now_us += 100.0
    assert made._postponed == {layer: [4, 5] for layer in range(LAYERS)}
    made.link_free_us = now_us
    step = made.begin(0, {0: 1}, 1, now_us)
    moves = made._make_up(1, range(LAYERS), Idle(now_us, now_us + 350.0))
    assert [(move.layer, move.expert) for move in moves] == [(1, 5)], "what fits, best first"
    assert made._postponed[1] == [4]


def a_pass(made: Controller, experts: Sequence[int], tokens: int, layers: int = LAYERS) -> None:
    """All layers need the same experts, each for every token."""
    for layer in range(layers):
        ids = np.tile(np.array(experts, dtype=np.int64), (tokens, 1))
        made.learn(layer, ids, np.full(ids.shape, 1.0 / len(experts), np.float32), None)
        step = made.begin(layer, loads(ids), tokens, made.link_free_us)
        made.finish(step)


def lopsided(passes: Sequence[int], lender: int = 0) -> Controller:
    """Passes of so many tokens, then the last layer has borrowed a slot."""
    made = controller(2, prefetch="off")
    made.warm_start()
    for tokens in passes:
        a_pass(made, (0, 1), tokens)
    made._evict(ExpertRef(lender, 1))
    made.pool.place(2, 7)
    made.pool.arrive(2, 7)
    made._value(2)
    return made


def test_prompts_in_a_row_give_back_what_a_layer_lacks_of_its_quota() -> None:
    made = lopsided([8, 8])
    a_pass(made, (0, 1, 2, 3, 4, 5), 8)
    assert [len(cached) for cached in made.pool.cached] == [2, 2, 2]
    made.pool.check_integrity()


def test_only_layers_above_their_quota_give_back_and_only_to_those_below() -> None:
    for lender, shares in ((0, [2, 2, 2]), (1, [2, 1, 3])):
        made = lopsided([8, 8], lender)
        made._worth[1, 0] = -1.0  # the least worthy of all, in a layer that owes nothing
        a_pass(made, (0, 1, 2, 3, 4, 5), 8, layers=1)
        assert [len(cached) for cached in made.pool.cached] == shares


@pytest.mark.parametrize("passes", [[1, 1], [8, 1], []])
def test_a_prompt_behind_an_answer_leaves_the_shares_as_the_answer_made_them(
    passes: list[int],
) -> None:
    made = lopsided(passes)
    a_pass(made, (0, 1, 2, 3, 4, 5), 8)
    assert [len(cached) for cached in made.pool.cached] == [1, 2, 3]


def test_a_row_needs_two_prompts_and_ends_with_the_answer() -> None:
    row, going = PromptRow((2, 4)), []
    for tokens in (8, 8, 3, 1, 8, 8):
        for layer in range(2):
            row.follow(layer, {0: tokens}, tokens)
        going.append(row.going)
    assert going == [False, True, True, False, False, True]
    assert (
        row.loads[0].tolist() == row.loads[1].tolist() and row.loads[0, 0] > 0.0 == row.loads[0, 1]
    )


def borrowed(lent_load: int, gain_us: float, tokens: Sequence[int] = (8, 8)) -> bool:
    """Whether a prefetch for layer 1 takes a slot of layer 0, which is done and has an expert of
    that load to lend.
    """
    made = controller(2, 4000.0, accelerator_us=10.0, prefetch="expected")
    made.warm_start()
    for count in tokens:
        made.row.follow(0, {0: 40, 1: lent_load}, count)
    assert made._in_a_row
    return made._borrow(1, 7, range(1), gain_us) is not None and made.pool.slot_of(0, 1) is None


def test_a_prefetch_of_prompts_in_a_row_must_gain_more_than_the_lender_loses() -> None:
    costs = tiny_experts.costs(transfer_us=4000.0, accelerator_us=10.0)
    loss_us = costs.cpu(
        1
    )  # of one token at the lender's next prompt, where the CPU has nothing else to do
    assert borrowed(4, 100.0 * loss_us)
    assert not borrowed(4, 0.01 * loss_us)
    assert borrowed(0, 0.01 * loss_us), "what no prompt needs is lent for nothing"


def test_what_a_layer_can_lend_is_judged_anew_when_it_has_run() -> None:
    made = controller(2, 4000.0, accelerator_us=10.0, prefetch="off")
    made.warm_start()
    losses = []
    for load in (1, 30):
        made.finish(made.begin(0, {0: 40, 1: load}, 41, made.link_free_us))
        loan = made._loan(0)
        assert loan is not None and loan.victim == (0, 1)
        losses.append(loan.loss_us)
    assert losses[1] > losses[0]


def test_a_prompt_alone_borrows_without_asking_for_the_next_one() -> None:
    made = controller(2, prefetch="expected")
    made.warm_start()
    made.row.follow(0, {0: 40, 1: 40}, 8)
    assert not made._in_a_row


def test_prompts_in_a_row_keep_the_heavier_demand_load() -> None:
    """All that is cached is in use, so a demand load finds no slot; it is kept where it lies."""
    for light, kept in ((1, {0, 7}), (30, {0, 1})):
        made = controller(2, 50.0, accelerator_us=5.0, prefetch="off")
        made.warm_start()
        for _ in range(4):
            for layer in range(LAYERS):
                step = made.begin(layer, {0: 40, 1: light, 7: 20}, 61, made.link_free_us)
                assert [move.expert for move in step.moves] == [7] or 7 in made.pool.cached[layer]
                made.finish(step)
                made.pool.check_integrity()
        assert [set(cached) for cached in made.pool.cached] == [kept] * LAYERS


def routed(*experts: int, ready_us: float = OFFLOADED) -> list[Routed]:
    return [Routed(expert, 1, ready_us) for expert in experts]


def test_confidence_is_the_share_that_came_true() -> None:
    trust = Confidence()
    assert trust.of((1, 0, False, True, True)) == 0.0
    for turn in range(400):
        trust.predicted(0, 1, routed(0, 1, 2, 3), many=False)
        trust.check(0, {0, 1, 2} if turn % 2 else {0})
    assert trust.of((1, 0, False, True, True)) == pytest.approx(0.75, abs=0.02), "the leading half"
    assert trust.of((1, 0, False, True, False)) == pytest.approx(0.25, abs=0.02)
    assert trust.of((2, 0, False, True, True)) == 0.0


def test_votes_and_residency_are_kinds_of_their_own() -> None:
    trust = Confidence()
    for _ in range(200):
        trust.predicted(0, 2, routed(5), many=False)
        trust.predicted(0, 1, [*routed(5, 6), *routed(7, ready_us=0.0)], many=False)
        trust.check(0, {5, 7})
    assert trust.of((1, 1, False, True, True)) > 0.9, "predicted twice"
    assert trust.of((1, 0, False, True, True)) < 0.1, "predicted once"
    assert trust.of((1, 0, False, False, False)) > 0.9, "resident"


def test_calls_of_many_tokens_are_trusted_by_halves_from_the_start() -> None:
    assert Confidence().of((1, 0, True, True, False)) == pytest.approx(0.5)
