"""Loans between layers while prompts follow one another, and what ends them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny_experts
from controllers import LAYERS, begin, make_controller

from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.policy.controller import Controller, Move
from hybrimoe_plugin.policy.prompt_streak import PromptStreak
from hybrimoe_plugin.policy.step import Lenders


def a_pass(made: Controller, experts: Sequence[int], tokens: int, layers: int = LAYERS) -> None:
    """All layers need the same experts, each for every token."""
    for layer in range(layers):
        step = begin(made, layer, experts, tokens, made.link.free_us)
        made.finish(step)


def lopsided(passes: Sequence[int], lender: int = 0) -> Controller:
    """Passes of so many tokens, then the last layer has borrowed a slot."""
    made = make_controller(2, prefetch="off")
    made.warm_start()
    for tokens in passes:
        a_pass(made, (0, 1), tokens)
    made.residency.evict(ExpertRef(lender, 1))
    slot = made.residency.admit(2, 7, Lenders(range(3)))
    assert slot is not None
    move = Move(2, 7, slot, 0.0, 0.0)
    made.residency.expect(move)
    made.residency.settle([move])
    made.residency.revalue(2)
    return made


def sizes(made: Controller) -> list[int]:
    return [len(cached) for cached in made.pool.cached]


def test_prompts_in_a_row_give_back_what_a_layer_lacks_of_its_quota() -> None:
    made = lopsided([8, 8])
    a_pass(made, (0, 1, 2, 3, 4, 5), 8)
    assert sizes(made) == [2, 2, 2]
    made.pool.check_integrity()


@pytest.mark.parametrize(("lender", "shares"), [(0, [2, 2, 2]), (1, [2, 1, 3])])
def test_only_layers_above_their_quota_give_back_and_only_to_those_below(
    lender: int, shares: list[int]
) -> None:
    made = lopsided([8, 8], lender)
    # The least worthy of all, in a layer that owes nothing.
    made.residency.worth[1, 0] = -1.0
    a_pass(made, (0, 1, 2, 3, 4, 5), 8, layers=1)
    assert sizes(made) == shares


@pytest.mark.parametrize("passes", [[1, 1], [8, 1], []])
def test_a_prompt_behind_an_answer_leaves_the_shares_as_the_answer_made_them(
    passes: list[int],
) -> None:
    made = lopsided(passes)
    a_pass(made, (0, 1, 2, 3, 4, 5), 8)
    assert sizes(made) == [1, 2, 3]


def test_a_streak_needs_two_prompts_and_ends_with_the_answer() -> None:
    streak = PromptStreak((2, 4))
    active = []
    for tokens in (8, 8, 3, 1, 8, 8):
        for layer in range(2):
            streak.follow(layer, {0: tokens}, tokens)
        active.append(streak.active)
    assert active == [False, True, True, False, False, True]
    assert streak.loads[0].tolist() == streak.loads[1].tolist()
    assert streak.loads[0, 0] > 0.0 == streak.loads[0, 1]


def borrowed(lent_load: int, gain_us: float) -> bool:
    """Whether a prefetch for layer 1 takes a slot of layer 0.

    Layer 0 has run and has an expert of that load to lend.
    """
    made = make_controller(2, 4000.0, accelerator_us=10.0, prefetch="expected")
    made.warm_start()
    for _ in range(2):
        made.loans.streak.follow(0, {0: 40, 1: lent_load}, 8)
    assert made.loans.active
    slot = made.loans.borrow(1, 7, Lenders(range(1)), gain_us)
    return slot is not None and made.pool.slot_of(0, 1) is None


def test_a_prefetch_of_prompts_in_a_row_must_gain_more_than_the_lender_loses() -> None:
    costs = tiny_experts.costs(transfer_us=4000.0, accelerator_us=10.0)
    # Of one token at the lender's next prompt, where the CPU has nothing else to do.
    loss_us = costs.cpu(1)
    assert borrowed(4, 100.0 * loss_us)
    assert not borrowed(4, 0.01 * loss_us)
    assert borrowed(0, 0.01 * loss_us), "what no prompt needs is lent for nothing"


def test_what_a_layer_can_lend_is_judged_anew_when_it_has_run() -> None:
    made = make_controller(2, 4000.0, accelerator_us=10.0, prefetch="off")
    made.warm_start()
    losses = []
    for load in (1, 30):
        step = made.begin(0, {0: 40, 1: load}, 41, made.link.free_us)
        made.finish(step)
        offer = made.loans.offer(0)
        assert offer is not None
        assert offer.victim == (0, 1)
        losses.append(offer.loss_us)
    assert losses[1] > losses[0]


def test_a_prompt_alone_borrows_without_asking_for_the_next_one() -> None:
    made = make_controller(2, prefetch="expected")
    made.warm_start()
    made.loans.streak.follow(0, {0: 40, 1: 40}, 8)
    assert not made.loans.active
