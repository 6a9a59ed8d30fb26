"""The decision loop: shared slots stay within the budget, and the link's bookkeeping holds."""

from __future__ import annotations

import numpy as np
import pytest
from controllers import EXPERTS, LAYERS, TOP_K, begin, make_controller, nobody_wants, routed
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_plugin.config import BUDGETS, CACHES, PREFETCHERS, SCHEDULERS, Settings
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller, Scored, loads

passes_of = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 2**31)),
    min_size=1,
    max_size=12,
)


@given(
    passes=passes_of,
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
    made = make_controller(quota, transfer_us, **choices)
    made.warm_start()
    now_us = 0.0
    for tokens, seed in passes:
        rng = np.random.default_rng(seed)
        for layer in range(LAYERS):
            now_us += checked_call(made, layer, tokens, rng, now_us) + 100.0
            made.pool.check_integrity()
            held = sum(len(cached) for cached in made.pool.cached)
            assert held <= quota * LAYERS
    counts = made.counters
    assert counts.prefetches >= counts.prefetches_used + counts.prefetches_wasted
    assert counts.experts_cpu + counts.experts_accelerator == counts.activations


def checked_call(
    made: Controller, layer: int, tokens: int, rng: np.random.Generator, now_us: float
) -> float:
    """One call with random routing and predictions; gives its makespan."""
    scores = rng.dirichlet(np.ones(EXPERTS), size=tokens).astype(np.float32)
    ids = np.argsort(-scores, axis=1)[:, :TOP_K]
    scored = Scored(ids, np.take_along_axis(scores, ids, axis=1), scores)
    step = made.begin(layer, loads(ids), tokens, now_us, scored)
    free_us = made.link.free_us
    ahead = []
    for later in range(layer + 1, LAYERS):
        guess = rng.integers(0, EXPERTS, ids.shape)
        ahead.append((later, loads(guess)))
    for move in made.look_ahead(step, ahead, now_us):
        assert move.start_us >= free_us - 1e-6, "transfers do not overlap on the link"
        free_us = move.end_us
    assert made.link.free_us == pytest.approx(max(free_us, made.link.free_us))
    made.finish(step)
    return step.plan.makespan_us


def test_layers_share_slots_where_they_may() -> None:
    """One layer always needs other experts, the others always the same two."""
    sizes = {}
    for budget in BUDGETS:
        made = make_controller(3, budget=budget, prefetch="off")
        made.warm_start()
        rng, now_us = np.random.default_rng(0), 0.0
        for _ in range(60):
            for layer in range(LAYERS):
                chosen = [0, 1]
                if layer == 0:
                    chosen = rng.choice(5, 2, replace=False).tolist()
                step = begin(made, layer, chosen, 1, now_us)
                made.look_ahead(step, [], now_us)
                made.finish(step)
                now_us += step.plan.makespan_us + 500.0
        sizes[budget] = [len(cached) for cached in made.pool.cached]
    assert sizes["layer"] == [3, 3, 3]
    assert sizes["shared"][0] == 5, "all that the first layer needs"
    assert sum(sizes["shared"]) == 9


def test_nothing_is_prefetched_on_predictions_that_never_come_true() -> None:
    made = make_controller(2)
    made.warm_start()
    rng, now_us = np.random.default_rng(0), 0.0
    for _ in range(40):
        for layer in range(LAYERS):
            chosen = rng.choice(4, 2, replace=False).tolist()
            step = begin(made, layer, chosen, 1, now_us)
            wrong = rng.choice(np.arange(4, 8), 2, replace=False).tolist()
            ahead = []
            if layer + 1 < LAYERS:
                ahead.append((layer + 1, dict.fromkeys(wrong, 1)))
            made.look_ahead(step, ahead, now_us)
            made.finish(step)
            now_us += step.plan.makespan_us + 500.0
    assert made.counters.prefetches == 0


@pytest.mark.parametrize(("busy_us", "sent"), [(0.0, True), (1e5, False)])
def test_nothing_is_queued_that_would_start_after_the_next_call(busy_us: float, sent: bool) -> None:
    """Else a link that no later call wants is free to everybody, and the queue grows for ever."""
    made = make_controller(2, prefetch="expected")
    made.warm_start()
    confidence = made.idle_prefetch.confidence
    for _ in range(50):
        confidence.predicted(1, 1, routed(0, 1, ready_us=0.0), many=False)
        confidence.check(1, routed(0, 1))
    made.link.free_us = 1e5
    step = begin(made, 0, [4, 5], 1, 0.0)
    assert step.plan.cpu == (4, 5)
    nobody_wants(made.link)
    made.link.free_us = busy_us
    made.look_ahead(step, [(1, {0: 1, 1: 1})], 0.0)
    assert (made.link.free_us > busy_us) == sent


def test_another_cache_begins_with_empty_slots() -> None:
    made = make_controller(2, cache="lru")
    made.warm_start()
    made.finish(begin(made, 0, [6, 7], 1, 0.0))
    popularity = np.tile(np.arange(EXPERTS, dtype=np.float64), (LAYERS, 1))
    cache = make_cache("lfu", LAYERS, EXPERTS, TOP_K, Settings(), popularity)
    made.restart(cache)
    assert made.cache is cache
    assert not any(made.pool.cached)
    first = made.warm_start()[:3]
    assert [(move.layer, move.expert) for move in first] == [(0, 7), (0, 6), (1, 7)]
    made.pool.check_integrity()


def test_with_empty_slots_nothing_is_left_to_evict() -> None:
    """One layer's experts take all slots before the others have run."""
    made = make_controller(1, transfer_us=1.0, accelerator_us=1.0, budget="shared")
    made.warm_start()
    made.restart(make_cache("adaptive", LAYERS, EXPERTS, TOP_K, Settings()))
    for experts in ([0, 1], [2, 3], [4, 5]):
        made.finish(begin(made, 0, experts, 1, made.link.free_us))
        made.pool.check_integrity()


def test_counters_begin_anew_for_all_who_count() -> None:
    made = make_controller(2, transfer_us=50.0, accelerator_us=5.0)
    made.warm_start()
    for turn in range(2):
        made.finish(begin(made, 0, [6 - turn, 7 - turn], 1, 0.0))
        assert made.counters.calls == 1
        assert made.counters.link_bytes == 100 * made.counters.demand_loads > 0
        made.counters.reset()
    assert made.counters == type(made.counters)()
