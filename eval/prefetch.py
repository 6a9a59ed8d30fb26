"""What becomes of prefetches?

Simulated on traces, with the engine's own controller on the paper's machine. Predictions are
recorded where a trace has them, else modelled at a stated recall (at distance 1; its d-th power at
distance d). Which experts lie in the slots at first is random, the same with prefetch and without.
A start alone changes decode by tenths of a percent and prompts by percents, so cells near level are
repeated from further starts and their mean is given. No column is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

from eval.policies import traces
from eval.policies.predictions import prediction_rows
from eval.policies.systems import OURS, System, build, prepare, prompt_of
from eval.reporting import plots, report
from eval.reporting.parallel import mapped
from eval.reporting.rows import column, distinct, where
from hybrimoe_plugin.replay.simulator import Outcome, replay
from hybrimoe_plugin.replay.trace import Trace

RECALLS = (0.0, 0.25, 0.5, 0.79, 1.0)
PUBLISHED_RECALL = 0.79
"""Strict top-k recall of router look-ahead, the best published (Fate)."""
RATIOS = (0.25, 0.5, 0.75)
PROFILES = ("a6000", "rtx4090-desktop", "laptop-8gb")
NEAR = 0.003
"""A difference between with and without that one start cannot tell from chance."""
STARTS = 5
"""Starts of such a cell."""
PROMPT_NEAR = 0.03
PROMPT_STARTS = 8
"""The same for prompts."""
START_NOISE = 1e-6
"""Just enough to order experts that are equally popular."""
FEW = 100
"""Prefetches below which a cell's share says little."""
DISTANCES = (1, 2, 3)
OFF = System("ours, prefetch off", {"prefetch": "off"})

Row = dict[str, Any]
Job = tuple[str, str, float, tuple[float, ...]]
"""Trace, profile, cache ratio, recalls."""
Pair = tuple[Outcome, Outcome]
"""Without prefetch and with it."""


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the question; gives the contents of the JSON line."""
    parser = report.parser(__doc__ or "")
    parser.add_argument(
        "--profiles", nargs="+", default=PROFILES, choices=PROFILES, help="machines to replay"
    )
    args = parser.parse_args(arguments)
    few = 2 if args.quick else None
    names = (*traces.REAL[:few], *traces.FLAT[:few], *traces.recorded_names())
    ratios: Sequence[float] = RATIOS
    profiles: Sequence[str] = args.profiles
    if args.quick:
        ratios, profiles = RATIOS[:1], PROFILES[:1]
    jobs: list[Job] = []
    for name in names:
        recalls = (PUBLISHED_RECALL,) if name in traces.RECORDED else RECALLS
        for profile in profiles:
            jobs += [(name, profile, ratio, recalls) for ratio in ratios]
    rows = [row for part in mapped(cells, jobs) for row in part]
    quality: list[Row] = []
    for name in names:
        quality += prediction_rows(name, routing(name), PUBLISHED_RECALL)
    first = profiles[0]
    shown = where(rows, profile=first)
    report.show(f"Prefetches in decode, {first} (simulated)", shown)
    report.show("Predictions by distance", quality)
    report.save_csv(args.out / "prefetch.csv", rows)
    report.save_csv(args.out / "prefetch_predictions.csv", quality)
    report.save_figure(args.out / "prefetch.png", lambda axes: draw(axes, rows))
    result = summary(rows)
    report.finish(result)
    return result


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """The JSON line."""
    recorded = where(rows, recall="recorded")
    judged = recorded + where(rows, recall=PUBLISHED_RECALL)
    enough = [row for row in judged if row["issued"] >= FEW]
    lowest = min(rows, key=lambda row: row["speedup over off"])
    prompt = min(rows, key=lambda row: row["prefill speedup over off"])
    return {
        "used_share": total(judged, "used") / total(judged, "issued"),
        "used_share_recorded": total(recorded, "used") / max(1.0, total(recorded, "issued")),
        "used_share_worst": min(column(enough, "used share")),
        "worst_speedup_over_off": lowest["speedup over off"],
        "worst_speedup_standard_error": lowest["standard error"],
        "worst_prefill_speedup_over_off": prompt["prefill speedup over off"],
        "worst_prefill_standard_error": prompt["prefill standard error"],
        "worst_run_speedup_over_off": min(column(rows, "run speedup over off")),
    }


def total(rows: Sequence[Row], name: str) -> float:
    """Sum of a column."""
    return float(sum(column(rows, name)))


def cells(job: Job) -> list[Row]:
    """One row for each recall; the runs without prefetch are the same for all."""
    name, profile, ratio, recalls = job
    trace = routing(name)
    without = [run(OFF, job, 0.0, 0)]
    prompts_without: list[Outcome] = []
    rows = []
    for recall in recalls:
        found = [run(OURS, job, recall, 0)]
        if is_near(without[0], found[0], "decode_us", NEAR):
            more = range(len(without), STARTS)
            without += [run(OFF, job, 0.0, start) for start in more]
            found += [run(OURS, job, recall, start) for start in range(1, STARTS)]
        pairs = list(zip(without, found, strict=False))
        prompts = pairs
        if is_near(without[0], found[0], "prefill_us", PROMPT_NEAR):
            if not prompts_without:
                prompts_without = run_prompts(OFF, job, 0.0)
            again = run_prompts(OURS, job, recall)
            prompts = list(zip(prompts_without, again, strict=True))
        rows.append(row_of(trace, (name, profile, ratio), recall, pairs, prompts))
    return rows


def run_prompts(system: System, job: Job, recall: float) -> list[Outcome]:
    """The prompt alone, from all starts."""
    return [run(system, job, recall, start, prompt=True) for start in range(PROMPT_STARTS)]


def row_of(
    trace: Trace,
    place: tuple[str, str, float],
    recall: float,
    pairs: Sequence[Pair],
    prompts: Sequence[Pair],
) -> Row:
    """Counts of the first start, speed over all starts of the whole trace and of the prompt.

    Args:
        place: trace, profile, cache ratio.
        pairs: of the whole trace, one for each start.
        prompts: the same of the prompt alone.
    """
    name, profile, ratio = place
    _, first = pairs[0]
    counts = first.decode_counters
    wasted_bytes = counts.prefetches_wasted * trace.header.expert_bytes
    decode = [gain(off, on, "decode_us") for off, on in pairs]
    prefill = [gain(off, on, "prefill_us") for off, on in prompts]
    whole = [gain(off, on, "prefill_us", "decode_us") for off, on in pairs]
    recorded = trace.header.predictions == "recorded"
    row: Row = {
        "trace": name,
        "profile": profile,
        "cache": ratio,
        "recall": "recorded" if recorded else recall,
        "issued": counts.prefetches,
        "used": counts.prefetches_used,
        "used share": share(counts.prefetches_used, counts.prefetches),
        "wasted MB per token": wasted_bytes / 1e6 / len(first.decode_us),
        "speedup over off": mean(decode),
        "starts": len(pairs),
        "standard error": standard_error(decode),
        "prefill speedup over off": mean(prefill),
        "prefill starts": len(prompts),
        "prefill standard error": standard_error(prefill),
        "run speedup over off": mean(whole),
    }
    for distance in DISTANCES:
        issued, used = first.by_distance.get(distance, (0, 0))
        row[f"issued at {distance}"] = issued
        row[f"used share at {distance}"] = share(used, issued)
    return row


def share(used: int, issued: int) -> float:
    """Share of prefetches that were used; 0 where none were issued."""
    return used / issued if issued else 0.0


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for one value."""
    if len(values) < 2:
        return 0.0
    return stdev(values) / len(values) ** 0.5


def gain(without: Outcome, found: Outcome, *phases: str) -> float:
    """Time without prefetch over time with it.

    Args:
        phases: `decode_us`, `prefill_us` or both, whose times are added.
    """
    before = sum(sum(getattr(without, phase)) for phase in phases)
    after = sum(sum(getattr(found, phase)) for phase in phases)
    return float(before / after)


def is_near(without: Outcome, found: Outcome, phase: str, limit: float) -> bool:
    """Whether both are too close to tell from one start which is faster."""
    return abs(gain(without, found, phase) - 1.0) < limit


def run(system: System, job: Job, recall: float, start: int, prompt: bool = False) -> Outcome:
    """One replay from a start of its own.

    Slots hold experts drawn at random, and predictions err anew.
    """
    name, profile, ratio, _ = job
    trace = routing(name)
    if prompt:
        trace = prompt_of(trace)
    header = trace.header
    costs = traces.costs_for(profile, trace, name)
    noise = np.random.default_rng(start).random((header.layers, header.experts))
    even = (1.0 + START_NOISE * noise) / header.experts
    return replay(prepare(system, trace, recall, start), build(system, trace, costs, ratio, even))


def routing(name: str) -> Trace:
    """The trace of a name."""
    if name in traces.SHAPES:
        return traces.flat(name, 32, 64, text=1)
    return traces.real(name)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Decode speed over no prefetch by recall, one line for each trace."""
    of_paper = where(rows, profile="a6000", cache=0.25)
    chosen = [row for row in of_paper if row["recall"] != "recorded"]
    ends = []
    for name, marker in zip(distinct(chosen, "trace"), "osD^vPX", strict=False):
        mine = where(chosen, trace=name)
        recalls = [100 * recall for recall in column(mine, "recall")]
        speeds = column(mine, "speedup over off")
        axes.plot(recalls, speeds, color=plots.OURS, marker=marker)
        ends.append((name, speeds[-1], plots.INK))
    axes.axhline(1.0, color=plots.OTHER, linestyle="--")
    ends.append(("no prefetch", 1.0, plots.OTHER))
    plots.label_ends(axes, ends)
    speeds = column(chosen, "speedup over off")
    least, most = min(speeds), max(speeds)
    axes.set_title(f"With prefetch, decode is {least:.2f}x to {most:.2f}x as fast as without")
    axes.set_xlabel("recall of the predictions, % (simulated)")
    axes.set_ylabel("decode speed over no prefetch")


if __name__ == "__main__":
    main()
