"""How often is an expert there when it is needed? Hit rates of cache policies, simulated on traces.

`cache alone` is reactive: nobody looks ahead and nothing takes time. `with prefetch` replays decode
on the paper's machine with the engine's controller and counts what was resident when its call
began. No column is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from eval.policies import traces
from eval.policies.hits import POLICIES, hit_rate
from eval.policies.systems import OURS, build, prepare
from eval.reporting import report
from eval.reporting.rows import column, distinct, where, within
from hybrimoe_plugin.replay.simulator import replay
from hybrimoe_plugin.replay.trace import Trace

Row = dict[str, Any]

RATIOS = (0.05, 0.1, 0.25, 0.5, 0.75)
JUDGED = (0.1, 0.25, 0.5)
FIXED = ("lru", "lfu", "ema", "mrs")
BUDGETS = ("layer", "shared")
RECALL = 0.79
"""Strict top-k recall of router look-ahead, the best published (Fate)."""


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the question; gives the contents of the JSON line."""
    args = report.parser(__doc__ or "").parse_args(arguments)
    names = (*traces.REAL, *traces.FLAT, *traces.recorded_names())
    others = names[len(traces.REAL) :]
    ratios = JUDGED if args.quick else RATIOS
    rows: list[Row] = []
    for name in names[:4] if args.quick else names:
        rows += hit_rows(name, ratios)
    ahead = [prefetch_row(name) for name in traces.REAL]
    report.show("Hit rate in decode, cache alone (simulated)", rows)
    title = "Resident when needed at 25 %, with prefetch on the paper's link (simulated)"
    report.show(title, ahead)
    report.save_csv(args.out / "cache.csv", rows)
    report.save_csv(args.out / "cache_prefetch.csv", ahead)
    report.save_figure(args.out / "cache.png", lambda axes: draw(axes, rows))
    result = {
        "lru_to_belady_closed": closed(rows, "shared"),
        "lru_to_belady_closed_layer": closed(rows, "layer"),
        "worst_margin_vs_any_policy": worst_margin(rows, traces.REAL),
        "worst_margin_other_traces": worst_margin(rows, others),
        "with_prefetch_closed": mean(column(ahead, "closed")),
    }
    report.finish(result)
    return result


def routing(name: str) -> Trace:
    """The trace of a name."""
    if name in traces.SHAPES:
        return traces.flat(name, 32, 96, text=1)
    return traces.real(name)


def hit_rows(name: str, ratios: Sequence[float]) -> list[Row]:
    """One row for each cache ratio and budget, one column for each policy."""
    trace = routing(name)
    rows = []
    for ratio in ratios:
        for budget in BUDGETS:
            row: Row = {"trace": name, "cache": ratio, "budget": budget}
            for policy in POLICIES:
                row[policy] = hit_rate(trace, policy, ratio, shared=budget == "shared")
            rows.append(row)
    return rows


def prefetch_row(name: str, ratio: float = 0.25) -> Row:
    """Cache and prefetch together against LRU and Belady without."""
    trace = routing(name)
    costs = traces.costs_for("a6000", trace, name)
    controller = build(OURS, trace, costs, ratio, None)
    seen = replay(prepare(OURS, trace, RECALL), controller).resident_rate
    lru = hit_rate(trace, "lru", ratio, shared=False)
    belady = hit_rate(trace, "belady", ratio, shared=False)
    return {
        "trace": name,
        "cache": ratio,
        "lru": lru,
        "belady": belady,
        "ours with prefetch": seen,
        "closed": (seen - lru) / (belady - lru),
    }


def closed(rows: Sequence[Row], budget: str) -> float:
    """How much of the gap from per-layer LRU to Belady our cache closes.

    Both caches have the same budget; hit rates are summed over the real traces.
    """
    judged = within(rows, "cache", JUDGED)
    real = within(judged, "trace", traces.REAL)
    chosen = where(real, budget=budget)
    lru = sum(column(where(real, budget="layer"), "lru"))
    ours = sum(column(chosen, "adaptive"))
    best = sum(column(chosen, "belady"))
    return float((ours - lru) / (best - lru))


def margin(rows: Sequence[Row], budget: str, names: Sequence[str]) -> float:
    """Lowest difference between ours and the best fixed policy of the same budget, in hit rate."""
    judged = within(rows, "cache", JUDGED)
    chosen = within(judged, "trace", names)
    margins = []
    for row in where(chosen, budget=budget):
        best = max(row[policy] for policy in FIXED)
        margins.append(row["adaptive"] - best)
    return float(min(margins, default=0.0))


def worst_margin(rows: Sequence[Row], names: Sequence[str]) -> float:
    """Lowest margin of both budgets."""
    return min(margin(rows, budget, names) for budget in BUDGETS)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Hit rate by cache size, one line for each policy."""
    real = within(rows, "trace", traces.REAL)
    layer = where(real, budget="layer")
    shared = where(real, budget="shared")
    for policy in POLICIES:
        _draw_line(axes, layer, policy, policy)
    _draw_line(axes, shared, "adaptive", "adaptive, shared slots")
    axes.set_xlabel("experts in the cache, %")
    axes.set_ylabel("decode hit rate, %, three traces (simulated)")
    axes.legend()


def _draw_line(axes: Any, rows: Sequence[Row], policy: str, label: str) -> None:
    percents = []
    rates = []
    for ratio in sorted(distinct(rows, "cache")):
        found = column(where(rows, cache=ratio), policy)
        percents.append(100 * ratio)
        rates.append(100 * mean(found))
    axes.plot(percents, rates, marker="o", label=label)


if __name__ == "__main__":
    main()
