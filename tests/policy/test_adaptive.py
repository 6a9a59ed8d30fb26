"""The learned cache: features, ranks that are probabilities, and weights that find what matters."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import ended, operations

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.policy.cache import adaptive, make_cache
from hybrimoe_plugin.policy.cache.adaptive import AGES, DECAYS, SCORE_STEP, STEPWISE, AdaptiveCache
from hybrimoe_plugin.policy.step import Scored
from hybrimoe_plugin.replay.sources import synthetic
from hybrimoe_plugin.replay.trace import Trace


def feed(cache: AdaptiveCache, trace: Trace) -> None:
    for call in trace.calls:
        cache.observe(call.layer, Scored(call.ids, call.weights, call.scores))


def routing(tokens: int = 200, **statistics: float) -> Trace:
    return synthetic(
        2,
        16,
        2,
        model="made",
        expert_bytes=1,
        prompt_tokens=0,
        decode_tokens=tokens,
        **statistics,  # type: ignore[arg-type]
    )


def test_features_follow_their_definitions() -> None:
    rows = np.array([[0, 1], [2, 1], [0, 3], [0, 1]])
    cache = AdaptiveCache(1, 5, 2)
    for row in rows:
        cache.observe(0, Scored(row[None], np.ones((1, 2), np.float32), None))
    features = cache.features[0]
    for index, step in enumerate(DECAYS):
        for expert in range(5):
            used = (rows == expert).any(axis=1)
            decayed = sum(step * (1 - step) ** (3 - t) for t in range(4) if used[t])
            assert features[index, expert] == pytest.approx(decayed)
    ages = {0: 0, 1: 0, 2: 2, 3: 1}
    for index, offset in enumerate(AGES, len(DECAYS)):
        for expert, age in ages.items():
            assert features[index, expert] == pytest.approx(1 / (age + offset))
        assert features[index, 4] < 1e-8, "never used"


def test_a_long_call_ends_where_single_tokens_end() -> None:
    trace = routing(STEPWISE + 40)
    ids = np.concatenate([call.ids for call in trace.calls if call.layer == 0])
    single, whole = AdaptiveCache(1, 16, 2), AdaptiveCache(1, 16, 2)
    for row in ids:
        single.observe(0, Scored(row[None], np.ones((1, 2), np.float32), None))
    whole.observe(0, Scored(ids, np.ones(ids.shape, np.float32), None))
    np.testing.assert_allclose(whole.features[:, :-1], single.features[:, :-1], atol=1e-9)
    forgotten = (1 - SCORE_STEP) ** STEPWISE
    np.testing.assert_allclose(whole.features[:, -1], single.features[:, -1], atol=2 * forgotten)


def test_weights_stand_in_for_scores() -> None:
    """Without scores, the chosen experts' weights are their scores, whatever they sum to."""
    ids, weights = np.array([[3, 1]]), np.array([[0.6, 0.2]], np.float32)
    scores = np.zeros((1, 5), np.float32)
    np.put_along_axis(scores, ids, weights, axis=1)
    shown, hidden = AdaptiveCache(1, 5, 2), AdaptiveCache(1, 5, 2)
    shown.observe(0, Scored(ids, weights, scores))
    hidden.observe(0, Scored(ids, weights, None))
    np.testing.assert_allclose(hidden.features, shown.features, rtol=1e-6)
    np.testing.assert_allclose(hidden.features[0, -2], [0.0, 0.5, 0.0, 1.5, 0.0], rtol=1e-6)
    assert hidden.features[0, -1, 3] == pytest.approx(1.5 * SCORE_STEP)
    hidden.observe(0, Scored(ids, np.zeros((1, 2), np.float32), None))
    assert np.isfinite(hidden.ranks).all(), "weights of zero"


def test_ranks_are_calibrated_probabilities() -> None:
    trace = routing(400, drift=0.6)
    cache, expected, happened = AdaptiveCache(2, 16, 2), [], []
    for index, call in enumerate(trace.calls):
        if index > 200:
            expected.append(cache.ranks[call.layer].sum())
            happened.append(cache.ranks[call.layer, call.ids[0]].sum())
        cache.observe(call.layer, Scored(call.ids, call.weights, call.scores))
    assert np.mean(expected) == pytest.approx(2.0, rel=0.15), "two experts are chosen"
    assert np.mean(happened) > 1.3 * 2 * np.mean(expected) / 16, (
        "the chosen ones ranked above chance"
    )


def test_the_weights_find_what_matters() -> None:
    """Drifting scores are best predicted by scores, fixed preferences by slow frequency."""
    drifting, fixed = AdaptiveCache(2, 16, 2), AdaptiveCache(2, 16, 2)
    feed(drifting, routing(locality=0.9))
    feed(fixed, routing(skew=1.0))
    assert drifting.weights[-2:].sum() > 0.2
    assert fixed.weights[0] > drifting.weights[0]


def test_popularity_is_where_it_starts() -> None:
    popularity = np.random.default_rng(0).dirichlet(np.ones(8), size=3)
    cache = make_cache("adaptive", 3, 8, 2, Settings(), popularity)
    for layer in range(3):
        assert cache.initial(layer, 3) == np.argsort(-popularity[layer])[:3].tolist()


def test_wrong_popularity_is_refused() -> None:
    with pytest.raises(ValueError, match="popularity"):
        AdaptiveCache(3, 8, 2, np.ones((2, 8)))


def tokens(seed: int, count: int, layers: int, experts: int, top_k: int) -> list[tuple[int, Any]]:
    """(layer, parts of `Scored`) of calls of one token and some of many."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        width = int(rng.choice([1, 1, 1, 1, 3, STEPWISE + 5]))
        for layer in range(layers):
            scores = rng.random((width, experts), dtype=np.float32) * rng.integers(0, 2)
            ids = np.argsort(-scores, axis=1)[:, :top_k]
            shown = scores if rng.integers(0, 4) else None
            found.append((layer, (ids, np.take_along_axis(scores, ids, axis=1), shown)))
    return found


@pytest.mark.skipif(adaptive.learn_token is None, reason="no C compiler at installation")
class TestNative:
    """The C function does what numpy does, but for the order of sums."""

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        layers=st.integers(1, 4),
        experts=st.sampled_from([3, 8, 13, 60, 128]),
        known=st.booleans(),
    )
    def test_it_learns_what_its_twin_learns(
        self, seed: int, layers: int, experts: int, known: bool
    ) -> None:
        popularity = None
        if known:
            popularity = np.random.default_rng(seed).dirichlet(np.ones(experts), layers)
        native, plain = (
            AdaptiveCache(layers, experts, 2, popularity, native=native) for native in (True, False)
        )
        for layer, arguments in tokens(seed, 12, layers, experts, 2):
            for each in (native, plain):
                each.observe(layer, Scored(*arguments))
            np.testing.assert_allclose(native.ranks, plain.ranks, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(native.features, plain.features, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(native.weights, plain.weights, rtol=1e-6, atol=1e-8)

    def test_a_copy_has_memory_of_its_own(self) -> None:
        cache = AdaptiveCache(2, 16, 2)
        feed(cache, routing(20))
        before = cache.ranks.copy()
        copied = deepcopy(cache)
        feed(copied, routing(5))
        np.testing.assert_array_equal(cache.ranks, before)
        feed(cache, routing(5))
        np.testing.assert_array_equal(cache.ranks, copied.ranks)

    @pytest.mark.parametrize("ids", [[[0, 16]], [[-1, 3]]])
    def test_an_expert_that_is_not_there_changes_nothing(self, ids: list[list[int]]) -> None:
        cache = AdaptiveCache(2, 16, 2)
        feed(cache, routing(5))
        before = cache.features.copy(), cache.ranks.copy()
        with pytest.raises(IndexError):
            cache.observe(
                0, Scored(np.array(ids), np.ones((1, 2), np.float32), np.ones((1, 16), "f"))
            )
        np.testing.assert_array_equal(cache.features, before[0])
        np.testing.assert_array_equal(cache.ranks, before[1])

    def test_it_counts_references_whatever_it_was_compiled_for(self) -> None:
        # One wheel serves all Pythons: headers of 3.12 take None for immortal, which it is not
        # before. Where it is, its count never changes.
        cache, trace = AdaptiveCache(2, 16, 2), routing(200)
        before = sys.getrefcount(None)
        feed(cache, trace)
        assert sys.getrefcount(None) > before - 100

    def test_addresses_are_whole_after_an_interrupt(self) -> None:
        def observe(cache: AdaptiveCache) -> None:
            cache.observe(0, Scored(np.array([[2, 3]]), np.ones((1, 2), np.float32), None))

        for at in range(1, operations(lambda: observe(AdaptiveCache(2, 16, 2)))):
            cache = AdaptiveCache(2, 16, 2)
            ended(partial(observe, cache), at, KeyboardInterrupt())
            observe(cache)

    def test_a_call_with_other_arguments_is_refused(self) -> None:
        learn: Any = adaptive.learn_token
        for arguments in ((), (0, 1, 1, 1.0, 0.0), ("a", 1, 1, 1.0, 0.0), (1, 1, 1, "a", 0.0)):
            with pytest.raises((TypeError, ValueError)):
                learn(*arguments)


def test_it_works_without_a_compiler() -> None:
    program = """
import sys
sys.modules["hybrimoe_plugin.policy.cache.one_token"] = None
import numpy as np
from hybrimoe_plugin.policy.cache.adaptive import AdaptiveCache, learn_token
from hybrimoe_plugin.policy.step import Scored
assert learn_token is None
cache = AdaptiveCache(1, 4, 2)
cache.observe(0, Scored(np.array([[2, 3]]), np.ones((1, 2), np.float32), None))
assert set(np.argsort(-cache.ranks[0])[:2].tolist()) == {2, 3}
"""
    subprocess.run([sys.executable, "-c", program], check=True)
