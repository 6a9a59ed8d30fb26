"""The measures of the policy questions: fair budgets, hit rates by definition, cells compared with
their own kind.
"""

from __future__ import annotations

import numpy as np
import pytest

from eval import cache, prefetch, replay, schedule
from eval.policies import traces
from eval.policies.hits import POLICIES, hit_rate
from eval.policies.systems import (
    ABLATION,
    BASELINES,
    LEARNING_FIRST,
    ORACLE,
    OURS,
    SINGLE,
    build,
    prepare,
    prompt_of,
    quotas,
)
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.replay.simulator import Outcome
from hybrimoe_plugin.replay.simulator import replay as run
from hybrimoe_plugin.replay.sources import synthetic
from hybrimoe_plugin.replay.trace import Trace


def tiny(decode: int = 40) -> Trace:
    return synthetic(
        3, 8, 2, model="made", expert_bytes=1000, prompt_tokens=0, decode_tokens=decode, drift=0.5
    )


def plain_lru(
    trace: Trace,
    each: int,
) -> float:
    """Per layer, token by token, with lists."""
    hits = needed = 0
    recent: dict[int, list[int]] = {}
    for call in trace.calls:
        order = recent.setdefault(call.layer, [])
        experts = call.ids[0].tolist()
        hits += sum(expert in order for expert in experts)
        needed += len(experts)
        for expert in experts:
            if expert in order:
                order.remove(expert)
        order.extend(sorted(experts))
        del order[:-each]
    return hits / needed


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_lru_is_lru(ratio: float) -> None:
    trace = tiny()
    assert hit_rate(trace, "lru", ratio, shared=False) == pytest.approx(
        plain_lru(trace, round(8 * ratio)), abs=0.01
    )


@pytest.mark.parametrize("shared", [False, True])
def test_belady_bounds_every_policy_and_all_cached_misses_only_once(shared: bool) -> None:
    trace = tiny()
    rates = {name: hit_rate(trace, name, 0.5, shared) for name in POLICIES}
    assert max(rates.values()) == rates["belady"]
    first_uses = len(
        {(call.layer, expert) for call in trace.calls for expert in call.ids[0].tolist()}
    )
    needed = sum(call.ids.size for call in trace.calls)
    assert hit_rate(trace, "adaptive", 1.0, shared) == pytest.approx(1 - first_uses / needed)


def test_every_system_has_the_same_number_of_slots() -> None:
    for ratio in (0.25, 0.5, 0.75):
        even, split = quotas(ratio, 26, 64, False), quotas(ratio, 26, 64, True)
        assert sum(even) == sum(split)
        assert sorted(set(split), reverse=True)[0] == 64


@pytest.mark.parametrize(
    "system", [*BASELINES, *ABLATION, *SINGLE, OURS, ORACLE], ids=lambda system: system.name
)
def test_every_system_runs(system: object) -> None:
    trace = tiny(6)
    costs = traces.costs_for("a6000-deepseek-v2-lite", trace, "made")
    found = run(prepare(system, trace, 0.79), build(system, trace, costs, 0.25, None))  # type: ignore[arg-type]
    assert len(found.decode_us) == 6
    assert min(found.decode_us) > 0


@pytest.mark.parametrize("name", traces.REAL)
def test_learning_behind_the_launches_costs_no_time(name: str) -> None:
    """With demand loads, prefetches and fills, behind a prompt."""
    whole = traces.real(name)
    trace = Trace(whole.header, whole.calls[: 12 * whole.header.layers])
    costs = traces.costs_for("laptop-8gb", trace, name)
    found = []
    for system in (OURS, LEARNING_FIRST):
        made = build(system, trace, costs, 0.25, None)
        found.append(run(prepare(system, trace, 0.79), made))
    deferred, first = found
    assert deferred.decode_us == first.decode_us
    assert deferred.prefill_us == first.prefill_us
    first.counters.plan_us = deferred.counters.plan_us
    assert deferred.counters == first.counters
    assert deferred.counters.demand_loads
    assert deferred.counters.prefetches


def test_shipped_routing_is_what_its_readme_says() -> None:
    facts = {name: traces.real(name) for name in traces.REAL}
    assert [(t.header.layers, t.header.experts, t.header.top_k) for t in facts.values()] == [
        (48, 128, 6),
        (30, 128, 6),
        (36, 128, 2),
    ]
    assert [sum(1 for g in t.passes() if len(g[0].ids) == 1) for t in facts.values()] == [
        128,
        128,
        64,
    ]
    np.testing.assert_allclose(
        traces.measured_popularity("mixtral_popularity.json").sum(axis=1), 1.0
    )


def test_first_experts_are_not_placed_by_what_is_judged() -> None:
    """Changing the judged half of a real trace must not change the placement."""
    trace = traces.real("gptoss")
    decode = [group for group in trace.passes() if len(group[0].ids) == 1]
    judged = {id(call) for group in decode[len(decode) // 2 :] for call in group}
    shuffled = [
        call._replace(ids=(call.ids + 1) % 128) if id(call) in judged else call
        for call in trace.calls
    ]
    np.testing.assert_array_equal(
        traces.other_text(trace, "gptoss"),
        traces.other_text(Trace(trace.header, shuffled), "gptoss"),
    )


def test_a_baseline_that_is_faster_shows() -> None:
    rows = [
        {
            "trace": "qwen",
            "profile": "a6000",
            "cache": 0.25,
            "system": name,
            "decode ms": decode,
            "prefill ms": prefill,
        }
        for name, decode, prefill in [
            (BASELINES[0].name, 9.0, 30.0),
            (OURS.name, 10.0, 20.0),
            (ORACLE.name, 5.0, 10.0),
        ]
    ]
    replay.compare(rows)
    assert replay.worst(rows[:1], "decode") == pytest.approx(0.9)
    assert replay.worst(rows[:1], "prefill") == pytest.approx(1.5)


def test_comparisons_near_level_are_repeated_from_the_same_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = replay.Place("qwen", "a6000", 0.25)
    systems = (BASELINES[0], BASELINES[1], OURS)
    jobs = [replay.Job(place, system, 4, False) for system in systems]
    rows = [
        {
            "trace": "qwen",
            "profile": "a6000",
            "cache": 0.25,
            "system": job.system.name,
            "decode ms": ms,
            "prefill ms": 9.0 * ms,
        }
        for job, ms in zip(jobs, (9.99, 20.0, 10.0), strict=True)
    ]
    replay.compare(rows)
    seen: list[tuple[str, int]] = []

    def mapped(
        work: object,
        starts: list[replay.Start],
    ) -> list[tuple[float, float]]:
        seen.extend((job.system.name, start) for job, start in starts)
        return [(1.0 if job.system is OURS else 1.0 + 0.1 * start, 1.0) for job, start in starts]

    monkeypatch.setattr(replay, "mapped", mapped)
    replay.repeat(rows, jobs, 3)
    assert sorted(seen) == sorted(
        (name, start) for name in (BASELINES[0].name, OURS.name) for start in range(3)
    )
    assert rows[0]["ours decode speedup"] == pytest.approx(1.1)
    assert rows[0]["decode standard error"] == pytest.approx(0.1 / 3**0.5)
    assert (rows[1]["ours decode speedup"], rows[1]["decode starts"]) == (2.0, 1)


def test_starts_place_experts_by_other_tokens_of_the_same_half() -> None:
    for name in ("gptoss", "deepseek-v2-lite"):
        trace = traces.real(name) if name in traces.REAL else traces.flat(name, 8, 8, text=1)
        first, again, other = (traces.other_text(trace, name, start) for start in (0, 0, 3))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()
        np.testing.assert_allclose(other.sum(axis=1), 1.0)


def outcome(
    prefill: float,
    decode: float,
    issued: int = 0,
    used: int = 0,
) -> Outcome:
    counts = Counters(prefetches=issued, prefetches_used=used)
    return Outcome([prefill], [decode], decode_counters=counts, by_distance={1: (issued, used)})


def test_speed_is_the_mean_over_starts_and_counts_are_of_the_first() -> None:
    without, found = (
        [outcome(10.0, 100.0), outcome(10.0, 100.0)],
        [outcome(8.0, 80.0, 4, 3), outcome(10.0, 125.0)],
    )
    pairs = list(zip(without, found, strict=True))
    row = prefetch.row_of(tiny(1), ("made", "a6000", 0.25), 0.5, pairs, pairs)
    assert row["speedup over off"] == pytest.approx((1.25 + 0.8) / 2)
    assert row["standard error"] == pytest.approx(0.225)
    assert row["prefill speedup over off"] == pytest.approx((1.25 + 1.0) / 2)
    assert (row["prefill starts"], row["prefill standard error"]) == (2, pytest.approx(0.125))
    assert row["run speedup over off"] == pytest.approx((110 / 88 + 110 / 135) / 2)
    assert (row["starts"], row["issued"], row["used share"], row["used share at 1"]) == (
        2,
        4,
        0.75,
        0.75,
    )


def test_cells_near_level_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {0.0: 100.0, 0.79: 80.0}
    monkeypatch.setattr(prefetch, "routing", lambda name: tiny(1))
    monkeypatch.setattr(
        prefetch,
        "run",
        lambda system, job, recall, start, prompt=False: outcome(
            1.0, 100.0 if system is prefetch.OFF else times[recall]
        ),
    )
    rows = prefetch.cells(("made", "a6000", 0.25, (0.0, 0.79)))
    assert [(row["recall"], row["starts"]) for row in rows] == [(0.0, prefetch.STARTS), (0.79, 1)]
    assert [row["prefill starts"] for row in rows] == [prefetch.PROMPT_STARTS] * 2


def test_starts_differ_and_are_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "routing", lambda name: tiny(2))
    first = []
    monkeypatch.setattr(
        prefetch, "replay", lambda trace, made: first.append(made.warm_start()) or outcome(1.0, 1.0)
    )
    for system, start in ((prefetch.OFF, 0), (OURS, 0), (OURS, 1)):
        prefetch.run(system, ("made", "a6000-deepseek-v2-lite", 0.25, (0.5,)), 0.5, start)
    assert first[0] == first[1] != first[2]


def test_a_prompt_is_what_has_many_tokens() -> None:
    prompt = prompt_of(traces.real("gptoss"))
    assert len(prompt.calls) == 36
    assert len(prompt.calls[0].ids) == 85


def test_recorded_runs_hold_predictions() -> None:
    assert traces.recorded_names() == traces.RECORDED
    for name in traces.RECORDED:
        assert traces.real(name).header.predictions == "recorded"


def test_share_of_the_way_to_belady() -> None:
    row = {
        "trace": "qwen",
        "cache": 0.25,
        "lru": 0.5,
        "belady": 0.9,
        "adaptive": 0.6,
        "lfu": 0.7,
        "ema": 0.1,
        "mrs": 0.2,
    }
    rows = [{**row, "budget": budget} for budget in cache.BUDGETS]
    assert cache.closed(rows, "shared") == pytest.approx(0.25)
    assert cache.margin(rows, "layer", ["qwen"]) == pytest.approx(-0.1)


def test_recorded_layers_reach_the_schedule_question() -> None:
    rows = schedule.recorded_rows(2, tokens=2)
    assert {row["scheduler"] for row in rows} == set(schedule.NAMES)
    assert all(row["gap_mean"] >= -1e-9 for row in rows)
