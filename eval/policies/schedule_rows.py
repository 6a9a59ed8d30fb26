"""Schedules of calls of a few rows: how far from the optimum, and how long planning takes.

Rows are tokens of real or flat routing, as conversations that decode together choose experts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.policies import traces
from eval.policies.calls import Call, few_row_call, union_call
from eval.reporting.quantiles import percentiles
from hybrimoe_plugin.core import Routed
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule import HybriMoEScheduler, optimum_us
from hybrimoe_plugin.replay.profile_files import load_profile, shipped
from hybrimoe_plugin.replay.trace import Trace

ROWS = (2, 4, 8, 16, 32)
RATIOS = (0.25, 0.5, 0.75)
LINKS = ("free", "in flight", "busy")
UNIONS = ((8, 2), (16, 4), (32, 4), (64, 8), (96, 8), (128, 10))
"""(experts that 16 rows choose together, experts of each row)."""
TIMED_ROWS = 16
VARIANTS = 12
PLANNERS = {"ours": False, "sweep": True}
"""Name -> whether it is the plain twin."""
GAP_COLUMNS = ("gap_mean", "gap_p99", "gap_worst")


class _Case(NamedTuple):
    rows: int
    costs: CostModel
    call: Call


def gap_rows(cases: int) -> list[dict[str, Any]]:
    """One row for each number of rows and planner, over all traces and profiles.

    Args:
        cases: of each trace and profile.
    """
    gaps: dict[tuple[int, str], list[float]] = {}
    for case in _cases(cases):
        routed, free_us = case.call
        found = {}
        for name, swept in PLANNERS.items():
            plan = HybriMoEScheduler(case.costs, swept).plan(routed, free_us)
            found[name] = plan.makespan_us
        best = optimum_us(routed, case.costs, free_us, min(found.values()))
        for name, makespan_us in found.items():
            gaps.setdefault((case.rows, name), []).append(makespan_us / best - 1)
    rows = []
    for (count, name), values in sorted(gaps.items()):
        numbers = statistics.mean(values), float(np.quantile(values, 0.99)), max(values)
        row = {"rows": count, "planner": name, "calls": len(values)}
        rows.append({**row, **dict(zip(GAP_COLUMNS, numbers, strict=True))})
    return rows


def time_rows(repeats: int) -> list[dict[str, Any]]:
    """One row for each union of 16 rows, planner and what is asked, over all profiles.

    Planners take turns, so that whatever else runs slows all of them.
    """
    rng = np.random.default_rng(0)
    profiles = [load_profile(name) for name in shipped()]
    machines = [profile.costs(profile.spec) for profile in profiles]
    rows = []
    for size, top_k in UNIONS:
        calls = [union_call(rng, size, TIMED_ROWS, top_k) for _ in range(VARIANTS)]
        spent: dict[tuple[str, str], list[float]] = {}
        for costs in machines:
            for turn in range(repeats):
                routed = calls[turn % VARIANTS]
                for name, swept in PLANNERS.items():
                    scheduler = HybriMoEScheduler(costs, swept)
                    for asked in ("plan", "makespan_us"):
                        us = _spent_us(getattr(scheduler, asked), routed)
                        spent.setdefault((asked, name), []).append(us)
        for (asked, name), values in spent.items():
            low, middle, high = percentiles(values)
            row = {"rows": TIMED_ROWS, "union": size, "asked": asked, "planner": name}
            rows.append({**row, "p20": low, "p50": middle, "p80": high})
    return rows


def _spent_us(ask: Any, routed: Sequence[Routed]) -> float:
    started = time.perf_counter_ns()
    ask(routed)
    return (time.perf_counter_ns() - started) / 1e3


def _cases(count: int) -> Iterator[_Case]:
    """Random calls: rows, cached share and state of the link are drawn for each."""
    rng = np.random.default_rng(0)
    for name in (*traces.REAL, *traces.FLAT):
        trace = _routing(name)
        by_layer = _tokens(name)
        for profile_name in shipped():
            profile = load_profile(profile_name)
            costs = profile.costs(traces.shape_of(trace, profile.spec))
            for _ in range(count):
                rows, ratio = int(rng.choice(ROWS)), float(rng.choice(RATIOS))
                link = str(rng.choice(LINKS))
                tokens = by_layer[int(rng.integers(len(by_layer)))]
                ids = tokens[rng.permutation(len(tokens))[:rows]]
                cached = _cached(rng, tokens, trace.header.experts, ratio)
                coming = int(rng.integers(1, 5)) if link == "in flight" else 0
                transfer_us = costs.transfer_us
                busy_us = float(rng.uniform(0, 2)) * transfer_us if link == "busy" else 0.0
                call = few_row_call(rng, ids, cached, coming, transfer_us, busy_us)
                yield _Case(rows, costs, call)


def _routing(name: str) -> Trace:
    return traces.real(name) if name in traces.REAL else traces.flat(name, 8, 128, 1)


@cache
def _tokens(name: str) -> list[NDArray[np.int64]]:
    """[N, K] the experts of each decoded token, for each layer."""
    trace = _routing(name)
    found: list[list[NDArray[np.int64]]] = [[] for _ in range(trace.header.layers)]
    for call in trace.calls:
        if len(call.ids) == 1:
            found[call.layer].append(call.ids)
    return [np.concatenate(calls) for calls in found]


def _cached(
    rng: np.random.Generator, tokens: NDArray[np.int64], experts: int, ratio: float
) -> set[int]:
    """What a cache of that share may hold: often chosen experts before others, with luck."""
    often = np.bincount(tokens.ravel(), minlength=experts) + rng.random(experts)
    order = np.argsort(-often * rng.uniform(0.2, 1.0, experts))
    return set(order[: round(ratio * experts)].tolist())
