"""Confidence: trust in predictions is earned, separately for each kind."""

from __future__ import annotations

import pytest
from controllers import routed

from hybrimoe_plugin.policy.prefetch import Confidence


def test_confidence_is_the_share_that_came_true() -> None:
    trust = Confidence()
    assert trust.of((1, 0, False, True, True)) == 0.0
    for turn in range(400):
        trust.predicted(0, 1, routed(0, 1, 2, 3), many=False)
        trust.check(0, routed(0, 1, 2) if turn % 2 else routed(0))
    leading = trust.of((1, 0, False, True, True))
    trailing = trust.of((1, 0, False, True, False))
    assert leading == pytest.approx(0.75, abs=0.02), "the leading half"
    assert trailing == pytest.approx(0.25, abs=0.02)
    assert trust.of((2, 0, False, True, True)) == 0.0


def test_votes_and_residency_are_kinds_of_their_own() -> None:
    trust = Confidence()
    for _ in range(200):
        trust.predicted(0, 2, routed(5), many=False)
        nearer = [*routed(5, 6), *routed(7, ready_us=0.0)]
        trust.predicted(0, 1, nearer, many=False)
        trust.check(0, routed(5, 7))
    assert trust.of((1, 1, False, True, True)) > 0.9, "predicted twice"
    assert trust.of((1, 0, False, True, True)) < 0.1, "predicted once"
    assert trust.of((1, 0, False, False, False)) > 0.9, "resident"


def test_what_has_a_slot_can_be_passed_over() -> None:
    """The place among the predicted experts counts all the same."""
    trust, plain = Confidence(), Confidence()
    asked = [*routed(1, ready_us=0.0), *routed(2), *routed(3, ready_us=20.0), *routed(4)]
    for _ in range(20):
        found = trust.predicted(0, 1, asked, many=False, offloaded_only=True)
        every = plain.predicted(0, 1, asked, many=False)
        assert found == {2: every[2], 4: every[4]}
        for each in (trust, plain):
            each.check(0, routed(1, 2))
    assert found[2] > 0.5 > found[4]


def test_calls_of_many_tokens_are_trusted_by_halves_from_the_start() -> None:
    assert Confidence().of((1, 0, True, True, False)) == pytest.approx(0.5)
