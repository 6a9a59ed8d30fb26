"""The engine computes what the plain experts compute, whoever computes what."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import EXPERTS, HIDDEN, WEIGHTS, build, plain, run

from hybrimoe_plugin.config import CACHES, PREFETCHERS
from hybrimoe_plugin.engine import CallRecord
from hybrimoe_plugin.engine.timeline import Timeline
from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.policy.step import Rows


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    "scheduler", ["hybrimoe", "static", "accelerator_only", "cpu_only", "greedy"]
)
def test_every_combination_equals_the_plain_experts(scheduler: str, ratio: float) -> None:
    # Every cache and every prefetcher, each with some of the other kind: all pairs would take a
    # minute.
    for cache, prefetch in zip(CACHES, itertools.cycle(PREFETCHERS), strict=False):
        engine, routers = build(
            scheduler=scheduler, cache=cache, prefetch=prefetch, cache_ratio=ratio
        )
        for seed, tokens in enumerate((1, 12, 1, 3)):
            run(engine, routers, tokens, seed)
        counts = engine.controller.counters
        assert counts.experts_cpu + counts.experts_accelerator == counts.activations > 0
        assert counts.prefetches >= counts.prefetches_used + counts.prefetches_wasted


def test_without_an_accelerator_the_cpu_computes_everything() -> None:
    engine, routers = build("none", cache_ratio=0.0)
    run(engine, routers, 5, 0)
    counts = engine.controller.counters
    assert counts.experts_cpu == counts.activations
    assert counts.transferred == 0


def test_no_weight_reaches_another_expert() -> None:
    """Upstream's fault: positions in sub-lists used as positions in the top-k list."""
    engine, _ = build(cache_ratio=0.5, scheduler="hybrimoe")
    hidden = torch.randn(1, HIDDEN)
    for first, second in itertools.permutations(range(EXPERTS), 2):
        ids = torch.tensor([[first, second]])
        routing = torch.tensor([[0.9, 0.1]])
        right = plain(WEIGHTS[0], hidden, ids, routing)
        swapped = plain(WEIGHTS[0], hidden, ids.flip(1), routing)
        output = engine.run(0, hidden, ids, routing)
        torch.testing.assert_close(output, right)
        assert (output - swapped).norm() > 0.05 * right.norm(), (
            "the test could not see a swapped weight"
        )


def test_prefetched_experts_are_used() -> None:
    engine, routers = build(cache_ratio=0.5, scheduler="static", prefetch="impact")
    for seed in range(30):
        run(engine, routers, 1, seed)
    counts = engine.controller.counters
    assert counts.prefetches > 0
    assert counts.prefetches_used > 0


def test_an_interrupted_call_leaves_the_engine_usable() -> None:
    engine, routers = build(cache_ratio=0.25)
    hidden = torch.randn(4, HIDDEN)
    ids, routing = routers[0].route(hidden)

    def interrupt(_hidden: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    routers[1].predict = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.run(0, hidden, ids, routing)
    del routers[1].predict
    engine.controller.pool.check_integrity()
    run(engine, routers, 4, 1)


def test_recorder_sees_every_call() -> None:
    engine, routers = build(cache_ratio=0.25, look_ahead=2)
    calls: list[CallRecord] = []
    engine.recorder = calls.append
    run(engine, routers, 3, 0)
    assert [call.layer for call in calls] == [0, 1, 2]
    assert [len(call.predicted) for call in calls] == [2, 1, 0]
    assert calls[0].scores is not None
    assert calls[0].scores.shape == (3, EXPERTS)


def test_timeline_is_a_trace_with_one_slice_per_expert(tmp_path: Path) -> None:
    engine, routers = build(cache_ratio=0.25)
    with Timeline(tmp_path / "run.json") as timeline:
        engine.timeline = timeline
        for seed in range(5):
            run(engine, routers, 2, seed)
    counts = engine.controller.counters
    events = [
        event for event in json.loads((tmp_path / "run.json").read_text()) if event["ph"] == "X"
    ]
    computed = [event for event in events if event["cat"] in ("cpu", "accelerator")]
    assert len(computed) == counts.activations
    assert len(events) - len(computed) == counts.transferred
    assert all(event["dur"] >= 0 for event in events)


def whose(owners: list[int], sure: bool = True) -> Rows:
    rows = Rows(np.array(owners), np.full(len(owners), sure))
    rows.sure[0] = True
    return rows


@pytest.mark.parametrize("rows", [1, 2, 8, 32])
def test_rows_of_several_conversations_change_no_result(rows: int) -> None:
    engine, routers = build(cache_ratio=0.5)
    engine.rows = whose(list(range(rows)))
    for seed in range(6):
        run(engine, routers, rows, seed)
    assert not engine.controller.loans.streak.active


def test_a_drafts_rows_are_verified() -> None:
    engine, routers = build(cache_ratio=0.5)
    for seed in range(3):
        engine.rows = whose([0] * 6, sure=False)
        run(engine, routers, 6, seed)
        before = engine.controller.cache.ranks.copy()
        engine.verified(np.arange(6) < 3)
        assert (engine.controller.cache.ranks != before).any()


@pytest.mark.parametrize("accelerator", ["emulated", "none"])
def test_rows_must_be_said_of_every_row(accelerator: str) -> None:
    engine, routers = build(accelerator, cache_ratio=0.5 if accelerator == "emulated" else 0.0)
    engine.rows = whose([0, 1, 2])
    with pytest.raises(InputError, match="4 rows"):
        run(engine, routers, 4, 0)
    engine.rows = None
    run(engine, routers, 4, 0)
