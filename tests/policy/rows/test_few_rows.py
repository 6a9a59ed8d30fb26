"""The learned cache and calls of a few rows: one step each, whatever the number of rows."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import ended, operations

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.policy.cache import AdaptiveCache, adaptive, make_cache
from hybrimoe_plugin.policy.step import Rows, Scored

LAYERS, EXPERTS, TOP_K = 3, 16, 2
PARTS = ("features", "ranks", "weights", "_last", "_moments", "_targets")
Call = tuple[Any, Any, Any]


def drawn(seed: int, rows: int, scores: bool = True) -> Call:
    """Ids, weights and scores of a call; the first experts are chosen most often."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, EXPERTS)) - 0.2 * np.arange(EXPERTS)
    shown = np.exp(logits).astype(np.float32)
    ids = np.argsort(-shown, axis=1)[:, :TOP_K]
    return ids, np.take_along_axis(shown, ids, axis=1), shown if scores else None


def one_pass(cache: AdaptiveCache, seed: int, rows: Rows | None, count: int = 1) -> None:
    for layer in range(LAYERS):
        cache.observe(layer, Scored(*drawn(seed * LAYERS + layer, count), rows))


def conversations(count: int) -> Rows:
    return Rows(np.arange(count), np.ones(count, bool))


def state(cache: AdaptiveCache) -> list[Any]:
    return [np.array(getattr(cache, part)) for part in PARTS] + [np.array(cache._seen)]


def same(one: AdaptiveCache, other: AdaptiveCache, **tolerance: float) -> None:
    for a, b in zip(state(one), state(other), strict=True):
        if tolerance:
            np.testing.assert_allclose(a, b, **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("native", [True, False])
def test_one_row_is_what_one_token_is(native: bool) -> None:
    said, plain = (AdaptiveCache(LAYERS, EXPERTS, TOP_K, native=native) for _ in range(2))
    for seed in range(20):
        one_pass(said, seed, conversations(1))
        one_pass(plain, seed, None)
    same(said, plain)


@pytest.mark.parametrize("native", [True, False])
def test_rows_that_agree_are_one_token(native: bool) -> None:
    many, one = (AdaptiveCache(LAYERS, EXPERTS, TOP_K, native=native) for _ in range(2))
    for seed in range(20):
        for layer in range(LAYERS):
            ids, weights, scores = drawn(seed * LAYERS + layer, 1)
            tiled = [np.tile(part, (4, 1)) for part in (ids, weights, scores)]
            many.observe(layer, Scored(*tiled, conversations(4)))
            one.observe(layer, Scored(ids, weights, scores))
    same(many, one, rtol=1e-6, atol=1e-8)


def test_a_call_is_one_step() -> None:
    cache = AdaptiveCache(LAYERS, EXPERTS, TOP_K)
    one_pass(cache, 0, conversations(16), 16)
    assert cache._seen == [1.0] * LAYERS


def test_the_order_of_rows_does_not_matter() -> None:
    ids, weights, scores = drawn(3, 8)
    turned, plain = (AdaptiveCache(LAYERS, EXPERTS, TOP_K) for _ in range(2))
    assert scores is not None
    plain.observe(0, Scored(ids, weights, scores, conversations(8)))
    turned.observe(0, Scored(ids[::-1], weights[::-1], scores[::-1], conversations(8)))
    same(turned, plain, rtol=1e-12, atol=1e-12)


def test_a_tree_does_not_outweigh_a_conversation_of_one_row() -> None:
    """Both conversations' experts rank alike, though one has fifteen rows."""
    cache = AdaptiveCache(1, EXPERTS, TOP_K)
    ids = np.array([[0, 1]] + [[8, 9]] * 15)
    rows = Rows(np.array([0] + [1] * 15), np.array([True, True] + [False] * 14))
    for _ in range(10):
        cache.observe(0, Scored(ids, np.ones(ids.shape, np.float32), None, rows))
    np.testing.assert_allclose(cache.ranks[0, [0, 1]], cache.ranks[0, [8, 9]], rtol=1e-9)
    assert cache.ranks[0, 0] > 0.3


@pytest.mark.skipif(adaptive.learn_token is None, reason="no C compiler at installation")
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(2, 32), scores=st.booleans())
def test_native_learns_what_its_twin_learns(seed: int, count: int, scores: bool) -> None:
    rng = np.random.default_rng(seed)
    native, plain = (AdaptiveCache(LAYERS, EXPERTS, TOP_K, native=native) for native in (1, 0))
    for number in range(6):
        rows = Rows(rng.integers(0, 4, count), rng.random(count) < 0.5)
        accepted = rng.random(count) < 0.5
        for cache in (native, plain):
            for layer in range(LAYERS):
                cache.observe(
                    layer, Scored(*drawn(seed + number * LAYERS + layer, count, scores), rows)
                )
            cache.verified(accepted)
    same(native, plain, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["lru", "ema", "mrs", "lfu"])
def test_a_fixed_rule_takes_a_call_for_one_step(name: str) -> None:
    """Nothing depends on the order of rows, and rows that agree are one token."""
    turned, plain, single = (make_cache(name, 1, EXPERTS, TOP_K, Settings()) for _ in range(3))
    for seed in range(3):
        ids, weights, scores = drawn(seed, 4)
        assert scores is not None
        plain.observe(0, Scored(ids, weights, scores, conversations(4)))
        turned.observe(0, Scored(ids[::-1], weights[::-1], scores[::-1], conversations(4)))
    np.testing.assert_allclose(turned.ranks, plain.ranks, rtol=1e-6)
    if name != "lfu":  # which counts rows
        tiled = [np.tile(part, (4, 1)) for part in drawn(9, 1)]
        agreeing = make_cache(name, 1, EXPERTS, TOP_K, Settings())
        agreeing.observe(0, Scored(*tiled, conversations(4)))
        single.observe(0, Scored(*drawn(9, 1)))
        np.testing.assert_allclose(agreeing.ranks, single.ranks, rtol=1e-6)


class TestVerified:
    """What a verification rejects is corrected as if it had been known."""

    def drafted(self, count: int = 8) -> Rows:
        return Rows(np.zeros(count, np.int64), np.arange(count) == 0)

    @pytest.mark.parametrize("native", [True, False])
    def test_it_is_as_if_it_had_been_known(self, native: bool) -> None:
        later, before = (AdaptiveCache(LAYERS, EXPERTS, TOP_K, native=native) for _ in range(2))
        rng = np.random.default_rng(0)
        rows = self.drafted()
        for seed in range(12):
            accepted = (rng.random(8) < 0.5) | rows.sure
            one_pass(later, seed, rows, 8)
            later.verified(accepted)
            one_pass(before, seed, Rows(rows.owners, accepted), 8)
            before.forget_draft()
        same(later, before)

    def test_rejected_rows_teach_less_than_accepted_ones(self) -> None:
        cache = AdaptiveCache(1, EXPERTS, TOP_K)
        ids = np.array([[0, 1], [2, 3], [4, 5]])
        for _ in range(10):
            cache.observe(0, Scored(ids, np.ones(ids.shape, np.float32), None, self.drafted(3)))
            cache.verified(np.array([True, True, False]))
        assert cache.ranks[0, 2] > 1.3 * cache.ranks[0, 4] > 0.0

    def test_the_calls_memory_may_be_used_again(self) -> None:
        """An engine's arrays hold the next call by then."""
        kept, reused = (AdaptiveCache(LAYERS, EXPERTS, TOP_K) for _ in range(2))
        accepted = np.arange(8) < 3
        for cache in (kept, reused):
            for layer in range(LAYERS):
                ids, weights, scores = drawn(layer, 8)
                assert scores is not None
                cache.observe(layer, Scored(ids, weights, scores, self.drafted()))
                if cache is reused:
                    ids[:], weights[:], scores[:] = 0, 0.0, 0.0
            cache.verified(accepted)
        same(kept, reused)

    def test_another_number_of_rows_is_refused_and_changes_nothing(self) -> None:
        cache, other = (AdaptiveCache(LAYERS, EXPERTS, TOP_K) for _ in range(2))
        for each in (cache, other):
            one_pass(each, 0, self.drafted(), 8)
        with pytest.raises(InputError, match="8 rows"):
            cache.verified(np.ones(7, bool))
        same(cache, other)
        cache.verified(np.ones(8, bool))
        assert not np.array_equal(cache.ranks, other.ranks)

    def test_an_interrupted_pass_is_not_corrected_later(self) -> None:
        cache, other = (AdaptiveCache(LAYERS, EXPERTS, TOP_K) for _ in range(2))
        accepted = np.arange(8) < 3
        for each in (cache, other):
            each.observe(0, Scored(*drawn(1, 8), self.drafted()))  # the pass ends here
            each.observe(0, Scored(*drawn(1, 8), self.drafted())) if each is cache else None
        # The next one begins at the first layer again, and only that one is corrected.
        assert len(cache._draft._calls) == 1
        other.forget_draft()
        before = state(other)
        other.verified(accepted)
        for a, b in zip(before, state(other), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("native", [True, False])
    def test_after_an_interrupt_it_can_be_said_again(self, native: bool) -> None:
        begun = AdaptiveCache(2, EXPERTS, TOP_K, native=native)
        for layer in range(2):
            begun.observe(layer, Scored(*drawn(layer, 8), self.drafted()))
        accepted = np.arange(8) < 3
        whole = deepcopy(begun)
        for at in range(1, operations(lambda: whole.verified(accepted))):
            cache = deepcopy(begun)
            ended(partial(cache.verified, accepted), at, KeyboardInterrupt())
            going_on = deepcopy(cache)
            for layer in range(2):
                going_on.observe(layer, Scored(*drawn(layer, 8), self.drafted()))
            assert np.isfinite(going_on.ranks).all()
            cache.verified(accepted)
            same(cache, whole)

    def test_what_was_learned_since_is_kept(self) -> None:
        """A token of another conversation between a pass and its verification."""
        cache, other = (AdaptiveCache(LAYERS, EXPERTS, TOP_K) for _ in range(2))
        for each in (cache, other):
            one_pass(each, 0, self.drafted(), 8)
            one_pass(each, 1, None)
        cache.verified(np.ones(8, bool))
        same(cache, other)
