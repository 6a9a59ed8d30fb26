"""What becomes of prefetches? Simulated on traces, with the engine's own controller on the paper's
machine.

Predictions are recorded where a trace has them, else modelled at a stated recall (at distance 1;
its d-th power at distance d). Which experts lie in the slots at first is random, the same with
prefetch and without. A start alone changes decode by tenths of a percent and prompts by percents,
so cells near level are repeated from further starts and their mean is given.
No column is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

from eval import report, traces
from eval.cells import mapped
from eval.systems import OURS, System, build, prepare, prompt_of
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
OFF = System("ours, prefetch off", {"prefetch": "off"})
Job = tuple[str, str, float, tuple[float, ...]]
"""Trace, profile, cache ratio, recalls."""
Pair = tuple[Outcome, Outcome]
"""Without prefetch and with it."""


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the question; gives what the JSON line says."""
    parser = report.parser(__doc__ or "")
    parser.add_argument(
        "--profiles", nargs="+", default=PROFILES, choices=PROFILES, help="machines to replay"
    )
    args = parser.parse_args(arguments)
    few = 2 if args.quick else None
    names = (*tuple(traces.REAL)[:few], *tuple(traces.FLAT)[:few], *traces.recorded_names())
    ratios, profiles = (RATIOS[:1], PROFILES[:1]) if args.quick else (RATIOS, args.profiles)
    jobs = [
        (name, profile, ratio, (PUBLISHED_RECALL,) if name in traces.RECORDED else RECALLS)
        for name in names
        for profile in profiles
        for ratio in ratios
    ]
    rows = [row for part in mapped(cells, jobs) for row in part]
    quality = [row for name in names for row in prediction_rows(name)]
    report.show(
        f"Prefetches in decode, {profiles[0]} (simulated)",
        [r for r in rows if r["profile"] == profiles[0]],
    )
    report.show("Predictions by distance", quality)
    report.save_csv(args.out / "prefetch.csv", rows)
    report.save_csv(args.out / "prefetch_predictions.csv", quality)
    report.save_figure(args.out / "prefetch.png", lambda axes: _draw(axes, rows))
    result = summary(rows)
    report.finish(result)
    return result


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The JSON line."""
    recorded = [row for row in rows if row["recall"] == "recorded"]
    judged = [*recorded, *(row for row in rows if row["recall"] == PUBLISHED_RECALL)]
    lowest = min(rows, key=lambda row: row["speedup over off"])
    prompt = min(rows, key=lambda row: row["prefill speedup over off"])
    return {
        "used_share": total(judged, "used") / total(judged, "issued"),
        "used_share_recorded": total(recorded, "used") / max(1.0, total(recorded, "issued")),
        "used_share_worst": min(
            row["used"] / row["issued"] for row in judged if row["issued"] >= FEW
        ),
        "worst_speedup_over_off": lowest["speedup over off"],
        "worst_speedup_standard_error": lowest["standard error"],
        "worst_prefill_speedup_over_off": prompt["prefill speedup over off"],
        "worst_prefill_standard_error": prompt["prefill standard error"],
        "worst_run_speedup_over_off": min(row["run speedup over off"] for row in rows),
    }


def total(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows))


def cells(job: Job) -> list[dict[str, Any]]:
    """One row for each recall; the runs without prefetch are the same for all."""
    name, profile, ratio, recalls = job
    trace, without = routing(name), [run(OFF, job, 0.0, 0)]
    prompts_without: list[Outcome] = []
    rows = []
    for recall in recalls:
        found = [run(OURS, job, recall, 0)]
        if abs(gain(without[0], found[0], "decode_us") - 1.0) < NEAR:
            without += [run(OFF, job, 0.0, start) for start in range(len(without), STARTS)]
            found += [run(OURS, job, recall, start) for start in range(1, STARTS)]
        prompts = list(zip(without, found, strict=False))
        if abs(gain(without[0], found[0], "prefill_us") - 1.0) < PROMPT_NEAR:
            prompts_without = prompts_without or [
                run(OFF, job, 0.0, s, prompt=True) for s in range(PROMPT_STARTS)
            ]
            again = [run(OURS, job, recall, start, prompt=True) for start in range(PROMPT_STARTS)]
            prompts = list(zip(prompts_without, again, strict=True))
        rows.append(
            row_of(
                trace,
                (name, profile, ratio),
                recall,
                list(zip(without, found, strict=False)),
                prompts,
            )
        )
    return rows


def row_of(
    trace: Trace,
    place: tuple[str, str, float],
    recall: float,
    pairs: Sequence[Pair],
    prompts: Sequence[Pair],
) -> dict[str, Any]:
    """Counts of the first start, speed over all starts of the whole trace and of the prompt."""
    first = pairs[0][1]
    counts = first.decode_counters
    decode = [gain(off, on, "decode_us") for off, on in pairs]
    prefill = [gain(off, on, "prefill_us") for off, on in prompts]
    row: dict[str, Any] = {
        **dict(zip(("trace", "profile", "cache"), place, strict=True)),
        "recall": "recorded" if trace.header.predictions == "recorded" else recall,
        "issued": counts.prefetches,
        "used": counts.prefetches_used,
        "used share": counts.prefetches_used / counts.prefetches if counts.prefetches else 0.0,
        "wasted MB per token": counts.prefetches_wasted
        * trace.header.expert_bytes
        / 1e6
        / len(first.decode_us),
        "speedup over off": mean(decode),
        "starts": len(pairs),
        "standard error": standard_error(decode),
        "prefill speedup over off": mean(prefill),
        "prefill starts": len(prompts),
        "prefill standard error": standard_error(prefill),
        "run speedup over off": mean(
            [gain(off, on, "prefill_us", "decode_us") for off, on in pairs]
        ),
    }
    for distance in (1, 2, 3):
        issued, used = first.by_distance.get(distance, (0, 0))
        row[f"issued at {distance}"] = issued
        row[f"used share at {distance}"] = used / issued if issued else 0.0
    return row


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for one value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def gain(without: Outcome, found: Outcome, *phases: str) -> float:
    """Time without prefetch over time with it."""
    return float(
        sum(sum(getattr(without, p)) for p in phases) / sum(sum(getattr(found, p)) for p in phases)
    )


def run(system: System, job: Job, recall: float, start: int, prompt: bool = False) -> Outcome:
    """One replay from a start of its own: slots hold experts drawn at random, and predictions err
    anew.
    """
    name, profile, ratio, _ = job
    trace = prompt_of(routing(name)) if prompt else routing(name)
    header, costs = trace.header, traces.costs_for(profile, trace, name)
    noise = np.random.default_rng(start).random((header.layers, header.experts))
    even = (1.0 + START_NOISE * noise) / header.experts
    return replay(prepare(system, trace, recall, start), build(system, trace, costs, ratio, even))


def routing(name: str) -> Trace:
    return traces.flat(name, 32, 64, text=1) if name in traces.SHAPES else traces.real(name)


def prediction_rows(name: str) -> list[dict[str, Any]]:
    """Share of what a decode call needed that was predicted, by distance; K are predicted, so
    precision is the same.
    """
    trace = prepare(OURS, routing(name), PUBLISHED_RECALL)
    found: dict[int, list[int]] = {}
    for group in trace.passes():
        needed = {call.layer: set(call.ids.ravel().tolist()) for call in group}
        for call in group if len(group[0].ids) == 1 else ():
            for distance, ids in enumerate(call.predicted, 1):
                if call.layer + distance in needed:
                    counts = found.setdefault(distance, [0, 0])
                    counts[0] += len(needed[call.layer + distance] & set(ids.ravel().tolist()))
                    counts[1] += ids.size
    kind = trace.header.predictions
    return [
        {"trace": name, "predictions": kind, "distance": distance, "recall": hit / made}
        for distance, (hit, made) in sorted(found.items())
    ]


def _draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    chosen = [
        row
        for row in rows
        if row["profile"] == "a6000" and row["cache"] == 0.25 and row["recall"] != "recorded"
    ]
    for name in dict.fromkeys(row["trace"] for row in chosen):
        mine = [row for row in chosen if row["trace"] == name]
        axes.plot(
            [100 * row["recall"] for row in mine],
            [row["speedup over off"] for row in mine],
            "o-",
            label=name,
        )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("recall of the predictions, %")
    axes.set_ylabel("decode speed over no prefetch (simulated)")
    axes.legend()


if __name__ == "__main__":
    main()
