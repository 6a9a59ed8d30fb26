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
from eval.reporting import plots, report
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
    """What each policy hits more often than LRU, by cache size."""
    real = within(rows, "trace", traces.REAL)
    layer = where(real, budget="layer")
    shared = where(real, budget="shared")
    ratios = sorted(distinct(real, "cache"))
    percents = [100 * ratio for ratio in ratios]
    lru = _rates(layer, "lru", ratios)

    def line(chosen: Sequence[Row], policy: str, label: str, color: str, **style: Any) -> None:
        found = _rates(chosen, policy, ratios)
        more = [100 * (rate - base) for rate, base in zip(found, lru, strict=True)]
        axes.plot(percents, more, label=label, color=color, **style)

    line(shared, "adaptive", "ours", plots.OURS, marker="o", linewidth=3, zorder=3)
    line(layer, "belady", "Belady's optimum", plots.LIMIT, marker="^")
    line(layer, "mrs", "MRS, of the HybriMoE paper", plots.OTHER, marker="s")
    line(layer, "ema", "moving average", plots.OTHER, linestyle=":")
    line(layer, "lfu", "LFU", plots.OTHER, linestyle="--")
    line(layer, "lru", "LRU", plots.OTHER)
    plots.below(axes)
    share = closed(rows, "shared")
    axes.set_title(f"Our cache goes {100 * share:.0f} % of the way from LRU to Belady's optimum")
    axes.set_xlabel("experts in the cache, % (simulated)")
    axes.set_ylabel("hit rate over LRU's, points")


def _rates(rows: Sequence[Row], policy: str, ratios: Sequence[float]) -> list[float]:
    """A policy's mean hit rate over the traces, for each cache size."""
    return [mean(column(where(rows, cache=ratio), policy)) for ratio in ratios]


if __name__ == "__main__":
    main()
