"""How often is an expert there when it is needed? Hit rates of cache policies, simulated on traces.

`cache alone` is reactive: nobody looks ahead and nothing takes time. `with prefetch` replays decode
on the paper's machine with the engine's controller and counts what was resident when its call
began. No column is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval import report, traces
from eval.hits import POLICIES, hit_rate
from eval.systems import OURS, build, prepare
from hybrimoe_plugin.replay.simulator import replay
from hybrimoe_plugin.replay.trace import Trace

RATIOS = (0.05, 0.1, 0.25, 0.5, 0.75)
JUDGED = (0.1, 0.25, 0.5)
FIXED = ("lru", "lfu", "ema", "mrs")
BUDGETS = ("layer", "shared")
RECALL = 0.79
"""Strict top-k recall of router look-ahead, the best published (Fate)."""


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the question; gives what the JSON line says."""
    args = report.parser(__doc__ or "").parse_args(arguments)
    names = (*traces.REAL, *traces.FLAT, *traces.recorded_names())
    rows = []
    for name in names[: 4 if args.quick else None]:
        rows += hit_rows(name, JUDGED if args.quick else RATIOS)
    ahead = [prefetch_row(name) for name in traces.REAL]
    report.show("Hit rate in decode, cache alone (simulated)", rows)
    report.show(
        "Resident when needed at 25 %, with prefetch on the paper's link (simulated)", ahead
    )
    report.save_csv(args.out / "cache.csv", rows)
    report.save_csv(args.out / "cache_prefetch.csv", ahead)
    report.save_figure(args.out / "cache.png", lambda axes: _draw(axes, rows))
    result = {
        "lru_to_belady_closed": closed(rows, "shared"),
        "lru_to_belady_closed_layer": closed(rows, "layer"),
        "worst_margin_vs_any_policy": min(margin(rows, budget, traces.REAL) for budget in BUDGETS),
        "worst_margin_other_traces": min(margin(rows, budget, names[3:]) for budget in BUDGETS),
        "with_prefetch_closed": sum(row["closed"] for row in ahead) / len(ahead),
    }
    report.finish(result)
    return result


def routing(name: str) -> Trace:
    return traces.flat(name, 32, 96, text=1) if name in traces.SHAPES else traces.real(name)


def hit_rows(name: str, ratios: Sequence[float]) -> list[dict[str, Any]]:
    """One row for each cache ratio and budget, one column for each policy."""
    trace = routing(name)
    return [
        {
            "trace": name,
            "cache": ratio,
            "budget": budget,
            **{policy: hit_rate(trace, policy, ratio, budget == "shared") for policy in POLICIES},
        }
        for ratio in ratios
        for budget in BUDGETS
    ]


def prefetch_row(name: str, ratio: float = 0.25) -> dict[str, Any]:
    """Cache and prefetch together against LRU and Belady without."""
    trace = routing(name)
    costs = traces.costs_for("a6000", trace, name)
    seen = replay(
        prepare(OURS, trace, RECALL), build(OURS, trace, costs, ratio, None)
    ).resident_rate
    lru, belady = (hit_rate(trace, policy, ratio, shared=False) for policy in ("lru", "belady"))
    return {
        "trace": name,
        "cache": ratio,
        "lru": lru,
        "belady": belady,
        "ours with prefetch": seen,
        "closed": (seen - lru) / (belady - lru),
    }


def closed(rows: Sequence[dict[str, Any]], budget: str) -> float:
    """Share of the way from per-layer LRU to Belady of the same budget, over the real traces' mean
    hit rates.
    """
    chosen = [row for row in rows if row["trace"] in traces.REAL and row["cache"] in JUDGED]
    lru = sum(row["lru"] for row in chosen if row["budget"] == "layer")
    ours, best = (
        sum(row[name] for row in chosen if row["budget"] == budget)
        for name in ("adaptive", "belady")
    )
    return float((ours - lru) / (best - lru))


def margin(rows: Sequence[dict[str, Any]], budget: str, names: Sequence[str]) -> float:
    """Worst of ours minus the best fixed policy of the same budget, in hit rate."""
    return float(
        min(
            (
                row["adaptive"] - max(row[policy] for policy in FIXED)
                for row in rows
                if row["trace"] in names and row["budget"] == budget and row["cache"] in JUDGED
            ),
            default=0.0,
        )
    )


def _draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    chosen = [row for row in rows if row["trace"] in traces.REAL and row["budget"] == "layer"]
    ratios = sorted({row["cache"] for row in chosen})
    shared = [row for row in rows if row["trace"] in traces.REAL and row["budget"] == "shared"]
    lines = [(policy, policy, chosen) for policy in POLICIES] + [
        ("adaptive, shared slots", "adaptive", shared)
    ]
    for label, policy, part in lines:
        means = [[row[policy] for row in part if row["cache"] == ratio] for ratio in ratios]
        axes.plot(
            [100 * r for r in ratios],
            [100 * sum(m) / len(m) for m in means],
            marker="o",
            label=label,
        )
    axes.set_xlabel("experts in the cache, %")
    axes.set_ylabel("decode hit rate, %, three traces (simulated)")
    axes.legend()


if __name__ == "__main__":
    main()
