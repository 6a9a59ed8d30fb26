"""What becomes of prefetches? Simulated on traces, with the engine's own controller on the paper's machine.

Predictions are recorded where a trace has them, else modelled at a stated recall (at distance 1; its d-th power at
distance d). No column is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval import report, traces
from eval.cells import mapped
from eval.systems import OURS, System, build, prepare
from hybrimoe_plugin.replay.simulator import Outcome, replay
from hybrimoe_plugin.replay.trace import Trace

RECALLS = (0.0, 0.25, 0.5, 0.79, 1.0)
PUBLISHED_RECALL = 0.79
"""Strict top-k recall of router look-ahead, the best published (Fate)."""
RATIOS = (0.25, 0.5, 0.75)
PROFILES = ("a6000", "rtx4090-desktop", "laptop-8gb")
OFF = System("ours, prefetch off", {"prefetch": "off"})
Job = tuple[str, str, float, float]
"""Trace, profile, cache ratio, recall."""


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the question; gives what the JSON line says."""
    args = report.parser(__doc__ or "").parse_args(arguments)
    names = (*traces.REAL, *traces.FLAT, *traces.recorded_names())
    ratios, profiles = (RATIOS[:1], PROFILES[:1]) if args.quick else (RATIOS, PROFILES)
    jobs = [
        (name, profile, ratio, recall)
        for name in names
        for profile in profiles
        for ratio in ratios
        for recall in ([PUBLISHED_RECALL] if name in traces.RECORDED else RECALLS)
    ]
    rows = mapped(cell, jobs)
    quality = [row for name in names for row in prediction_rows(name)]
    report.show("Prefetches in decode (simulated)", [row for row in rows if row["profile"] == "a6000"])
    report.show("Predictions by distance", quality)
    report.save_csv(args.out / "prefetch.csv", rows)
    report.save_csv(args.out / "prefetch_predictions.csv", quality)
    report.save_figure(args.out / "prefetch.png", lambda axes: _draw(axes, rows))
    judged = [row for row in rows if row["recall"] in ("recorded", PUBLISHED_RECALL) and row["issued"] >= 20]
    result = {
        "used_share": total(judged, "used") / total(judged, "issued"),
        "used_share_worst": min(row["used"] / row["issued"] for row in judged),
        "worst_speedup_over_off": min(row["speedup over off"] for row in rows),
    }
    report.finish(result)
    return result


def total(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows))


def cell(job: Job) -> dict[str, Any]:
    """One run with prefetch, beside one without."""
    name, profile, ratio, recall = job
    trace = routing(name)
    with_it, without = run(OURS, job, trace), run(OFF, job, trace)
    counts = with_it.decode_counters
    row: dict[str, Any] = {
        "trace": name,
        "profile": profile,
        "cache": ratio,
        "recall": "recorded" if trace.header.predictions == "recorded" else recall,
        "issued": counts.prefetches,
        "used": counts.prefetches_used,
        "used share": counts.prefetches_used / counts.prefetches if counts.prefetches else 0.0,
        "wasted MB per token": counts.prefetches_wasted * trace.header.expert_bytes / 1e6 / len(with_it.decode_us),
        "speedup over off": sum(without.decode_us) / sum(with_it.decode_us),
        "prefill speedup over off": sum(without.prefill_us) / sum(with_it.prefill_us),
    }
    for distance in (1, 2, 3):
        issued, used = with_it.by_distance.get(distance, (0, 0))
        row[f"issued at {distance}"] = issued
        row[f"used share at {distance}"] = used / issued if issued else 0.0
    return row


def run(system: System, job: Job, trace: Trace) -> Outcome:
    name, profile, ratio, recall = job
    costs = traces.costs_for(profile, trace, name)
    return replay(prepare(system, trace, recall), build(system, trace, costs, ratio, None))


def routing(name: str) -> Trace:
    return traces.flat(name, 32, 64, text=1) if name in traces.SHAPES else traces.real(name)


def prediction_rows(name: str) -> list[dict[str, Any]]:
    """Share of what a decode call needed that was predicted, by distance; K are predicted, so precision is the same."""
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
    chosen = [row for row in rows if row["profile"] == "a6000" and row["cache"] == 0.25 and row["recall"] != "recorded"]
    for name in dict.fromkeys(row["trace"] for row in chosen):
        mine = [row for row in chosen if row["trace"] == name]
        axes.plot([100 * row["recall"] for row in mine], [row["speedup over off"] for row in mine], "o-", label=name)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("recall of the predictions, %")
    axes.set_ylabel("decode speed over no prefetch (simulated)")
    axes.legend()


if __name__ == "__main__":
    main()
