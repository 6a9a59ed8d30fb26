"""Cache policies against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.cache.mrs import MRSCache
from hybrimoe_plugin.policy.step import Scored


def plain_mrs(scores: np.ndarray, alpha: float, p: int) -> np.ndarray:
    """Paper section 4.4, token by token."""
    ranks = np.zeros(scores.shape[1])
    for row in scores:
        kept = np.zeros_like(row)
        top = np.argsort(-row)[:p]
        kept[top] = row[top]
        ranks = alpha * kept + (1 - alpha) * ranks
    return ranks


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("cuts", [[1] * 40, [40], [7, 1, 32]])
def test_mrs_counts_every_token_of_a_call(alpha: float, cuts: list[int]) -> None:
    scores = np.random.default_rng(0).dirichlet(np.ones(16), size=40).astype(np.float32)
    cache = MRSCache(1, 16, alpha, p=4)
    start = 0
    for cut in cuts:
        part = scores[start : start + cut]
        ids = np.argsort(-part, axis=1)[:, :2]
        cache.observe(0, Scored(ids, np.take_along_axis(part, ids, axis=1), part))
        start += cut
    np.testing.assert_allclose(cache.ranks[0], plain_mrs(scores, alpha, 4), rtol=1e-5, atol=1e-7)


def test_mrs_without_scores_takes_the_routing_weights() -> None:
    cache = MRSCache(1, 4, 0.5, p=2)
    cache.observe(0, Scored(np.array([[2, 0]]), np.array([[0.75, 0.25]], np.float32), None))
    np.testing.assert_allclose(cache.ranks[0], [0.125, 0, 0.375, 0])


def observed(name: str, *ids: list[int]) -> object:
    cache = make_cache(name, 1, 6, 2, Settings())
    for row in ids:
        cache.observe(0, Scored(np.array([row]), np.ones((1, len(row)), np.float32), None))
    return cache


def test_victims() -> None:
    history = ([0, 1], [2, 1], [0, 3])
    assert make_cache("static", 1, 6, 2, Settings()).victim(0, [4, 2]) == 2
    assert observed("lru", *history).victim(0, [0, 1, 2, 3]) == 1  # type: ignore[attr-defined]
    assert observed("lfu", *history).victim(0, [0, 1, 2, 3]) == 2  # type: ignore[attr-defined]


def test_admission() -> None:
    assert observed("lru", [0, 1]).admits(0, 5, 0)  # type: ignore[attr-defined]
    assert not observed("lfu", [0, 1]).admits(0, 5, 0)  # type: ignore[attr-defined]
    assert not observed("static", [0, 1]).admits(0, 0, 5)  # type: ignore[attr-defined]


def test_unknown_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="cache"):
        make_cache("arc", 1, 4, 2, Settings())
