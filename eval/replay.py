"""How long do prefill and decode take, by system, cache ratio and machine? Every time is simulated.

The engine's own controller runs over routing traces and machine profiles. All systems start with
the same experts resident, placed by other text; the first half of each answer warms the policies up
and the second half is judged. Comparisons that end near level are repeated from further starts, the
same for both systems, and their mean is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from eval import report, traces
from eval.cells import mapped
from eval.systems import (
    ABLATION,
    BASELINES,
    KTRANSFORMERS,
    ORACLE,
    OURS,
    PUBLISHED,
    SINGLE,
    System,
    build,
    prepare,
    prompt_of,
)
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.replay.simulator import Outcome, replay
from hybrimoe_plugin.replay.trace import Trace

RATIOS = (0.25, 0.5, 0.75)
RECALL = 0.79
"""Strict top-k recall of router look-ahead, the best published (Fate)."""
PROMPTS = (32, 128, 512)
"""Further prompt lengths, besides 64, for generated routing on the paper's machine; real traces
have their own.
"""
DRAWS = 8
"""How often a prompt is replayed, each time with other errors of the modelled predictions."""
NEAR = 0.005
"""A difference between two systems that one start cannot tell from chance."""
STARTS = 8
"""Starts of such a comparison: each with experts placed by another text and with other errors of
the predictions.
"""
PAPER = ("a6000", "constants")
MACHINES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(traces.FLAT, ("a6000", "constants", "rtx4090-desktop", "laptop-8gb")),
    **dict.fromkeys(traces.REAL, ("a6000", "rtx4090-desktop", "laptop-8gb")),
}
SYSTEMS = (*BASELINES, OURS, ORACLE)
Job = tuple[str, str, float, System, int, bool]
"""Trace, profile, cache ratio, system, decode tokens, whether prompts of all lengths are timed."""
PHASES = ("decode", "prefill")
Place = tuple[str, str, float]
"""Trace, profile, cache ratio."""
Start = tuple[Job, int]


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the question; gives what the JSON line says."""
    args = report.parser(__doc__ or "").parse_args(arguments)
    names = (*traces.FLAT, *traces.REAL)
    tokens = 24 if args.quick else 128
    jobs: list[Job] = [
        (name, machine, ratio, system, tokens, not args.quick and machine in PAPER)
        for name in names
        for machine in MACHINES[name][: 1 if args.quick else None]
        for ratio in RATIOS
        for system in SYSTEMS
    ]
    rows = mapped(cell, jobs)
    compare(rows)
    repeat(rows, jobs, 2 if args.quick else STARTS)
    steps = mapped(
        cell, [("qwen2-57b-a14b", "a6000", 0.25, system, tokens, False) for system in steps_shown()]
    )
    for row in steps:
        row["decode speedup"] = steps[0]["decode ms"] / row["decode ms"]
        row["prefill speedup"] = steps[0]["prefill ms"] / row["prefill ms"]
    report.show("Time per pass (simulated)", [row for row in rows if row["profile"] == "a6000"])
    report.show(
        "Ablation: Qwen2-57B-A14B, flat routing, 25 % cached, the paper's machine (simulated)",
        steps,
    )
    report.save_csv(args.out / "replay.csv", rows)
    report.save_csv(args.out / "replay_ablation.csv", steps)
    report.save_figure(args.out / "replay.png", lambda axes: _draw(axes, rows), width=9.0)
    result = summary(rows)
    report.finish(result)
    return result


def steps_shown() -> tuple[System, ...]:
    """Each step on top of the one before, then single parts on the static baseline, then the
    paper's own system.
    """
    return (*ABLATION, *SINGLE, PUBLISHED, ORACLE)


def cell(job: Job) -> dict[str, Any]:
    """One system on one trace and machine."""
    name, machine, ratio, system, tokens, lengths = job
    trace = traces.flat(name, 64, tokens, text=1) if name in traces.SHAPES else traces.real(name)
    decode = sum(1 for group in trace.passes() if len(group[0].ids) == 1)
    popularity, costs = traces.other_text(trace, name), traces.costs_for(machine, trace, name)
    found = replay(
        prepare(system, trace, RECALL), build(system, trace, costs, ratio, popularity), decode // 2
    )
    first = list(found.prefill_us)
    prompt = prompt_of(trace)
    for draw in range(1, DRAWS) if Settings.of(system.settings).prefetch != "off" else ():
        first += replay(
            prepare(system, prompt, RECALL, draw), build(system, prompt, costs, ratio, popularity)
        ).prefill_us
    prefill = [mean(first)]
    for length in PROMPTS if lengths and name in traces.SHAPES else ():
        prompt = Trace(trace.header, traces.flat(name, length, 0, text=1).calls)
        prefill += replay(
            prepare(system, prompt, RECALL), build(system, prompt, costs, ratio, popularity)
        ).prefill_us
    return {
        "trace": name,
        "profile": machine,
        "cache": ratio,
        "system": system.name,
        "decode ms": sum(found.decode_us) / len(found.decode_us) / 1e3,
        "prefill ms": mean(prefill) / 1e3,
        "resident": found.resident_rate,
        "MB per token": found.decode_counters.link_bytes / len(found.decode_us) / 1e6,
    }


def timed(place: Start) -> tuple[float, float]:
    """Decode and prefill time of one system from one start, for ratios of systems from the same
    start.
    """
    (name, machine, ratio, system, tokens, lengths), start = place
    trace = traces.flat(name, 64, tokens, text=1) if name in traces.SHAPES else traces.real(name)
    popularity, costs = (
        traces.other_text(trace, name, start),
        traces.costs_for(machine, trace, name),
    )

    def run(routing: Trace, skip: int = 0) -> Outcome:
        return replay(
            prepare(system, routing, RECALL, start),
            build(system, routing, costs, ratio, popularity),
            skip,
        )

    found = run(trace, sum(1 for group in trace.passes() if len(group[0].ids) == 1) // 2)
    prefill = list(found.prefill_us)
    for length in PROMPTS if lengths and name in traces.SHAPES else ():
        prefill += run(Trace(trace.header, traces.flat(name, length, 0, text=1).calls)).prefill_us
    return sum(found.decode_us), mean(prefill)


def repeat(rows: Sequence[dict[str, Any]], jobs: Sequence[Job], starts: int) -> None:
    """Time comparisons with baselines that are near level again; give mean and standard error.
    Mutates the rows.
    """
    baselines = {system.name for system in BASELINES}
    by_row = {(*job[:3], job[3].name): job for job in jobs}
    near = [
        row
        for row in rows
        if row["system"] in baselines and any(is_near(row, phase) for phase in PHASES)
    ]
    names = dict.fromkeys((*key(row), name) for row in near for name in (row["system"], OURS.name))
    times = iter(
        mapped(timed, [(by_row[name], start) for name in names for start in range(starts)])
    )
    found = {name: [next(times) for _ in range(starts)] for name in names}
    chosen = {id(row) for row in near}
    for row in rows:
        for index, phase in enumerate(PHASES):
            again = id(row) in chosen and is_near(row, phase)
            row[f"{phase} starts"], row[f"{phase} standard error"] = (starts if again else 1), 0.0
            if again:
                pairs = zip(
                    found[(*key(row), row["system"])], found[(*key(row), OURS.name)], strict=True
                )
                ratios = [theirs[index] / mine[index] for theirs, mine in pairs]
                row[f"ours {phase} speedup"] = fmean(ratios)
                row[f"{phase} standard error"] = stdev(ratios) / len(ratios) ** 0.5


def is_near(row: dict[str, Any], phase: str) -> bool:
    return abs(float(row[f"ours {phase} speedup"]) - 1.0) < NEAR


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add what ours gains over each system in its cell. Mutates the rows."""
    ours = {key(row): row for row in rows if row["system"] == OURS.name}
    for row in rows:
        mine = ours[key(row)]
        row["ours decode speedup"] = row["decode ms"] / mine["decode ms"]
        row["ours prefill speedup"] = row["prefill ms"] / mine["prefill ms"]


def key(row: dict[str, Any]) -> Place:
    return row["trace"], row["profile"], row["cache"]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The JSON line."""
    flat = [
        row for row in rows if row["trace"] in traces.FLAT and row["system"] == KTRANSFORMERS.name
    ]
    paper, constants = (
        [row for row in flat if row["profile"] == machine] for machine in ("a6000", "constants")
    )
    baselines = [row for row in rows if row["system"] in {system.name for system in BASELINES}]
    oracle = [row for row in rows if row["system"] == ORACLE.name]
    lowest = min(baselines, key=lambda row: float(row["ours decode speedup"]))
    result = {
        "decode_speedup_geomean": mean(row["ours decode speedup"] for row in paper),
        "prefill_speedup_geomean": mean(row["ours prefill speedup"] for row in paper),
        "worst_cell_vs_any_baseline": min(worst(baselines, "decode"), worst(baselines, "prefill")),
        "worst_decode_cell": worst(baselines, "decode"),
        "worst_decode_standard_error": float(lowest["decode standard error"]),
        "worst_prefill_cell": worst(baselines, "prefill"),
        "oracle_share_decode": mean(row["ours decode speedup"] for row in oracle),
        "oracle_share_prefill": mean(row["ours prefill speedup"] for row in oracle),
    }
    if constants:
        result["constants_decode_speedup_geomean"] = mean(
            row["ours decode speedup"] for row in constants
        )
        result["constants_prefill_speedup_geomean"] = mean(
            row["ours prefill speedup"] for row in constants
        )
        limit = [row for row in oracle if row["profile"] == "constants"]
        result["constants_oracle_share_decode"] = mean(row["ours decode speedup"] for row in limit)
    return result


def worst(rows: Sequence[dict[str, Any]], phase: str) -> float:
    return float(min(row[f"ours {phase} speedup"] for row in rows))


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    chosen = [row for row in rows if row["profile"] == "a6000"]
    names = [system.name for system in SYSTEMS]
    labels = [
        f"{name}\n{int(100 * ratio)} %" for name in (*traces.FLAT, *traces.REAL) for ratio in RATIOS
    ]
    cells = [(name, "a6000", ratio) for name in (*traces.FLAT, *traces.REAL) for ratio in RATIOS]
    base = {key(row): row["decode ms"] for row in chosen if row["system"] == KTRANSFORMERS.name}
    for index, system in enumerate(names):
        found = {
            key(row): base[key(row)] / row["decode ms"] for row in chosen if row["system"] == system
        }
        axes.bar(
            [at + index * 0.12 for at in range(len(cells))],
            [found[c] for c in cells],
            0.12,
            label=system,
        )
    axes.set_xticks([at + 0.36 for at in range(len(cells))], labels, fontsize=5, rotation=60)
    axes.set_ylabel("decode speed over static (simulated)")
    axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
