"""How far are plans from the exact optimum, and how long does planning take?

Plan time is measured here; makespans are simulated in the machine model of
`hybrimoe_plugin.policy.schedule`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval import report, traces
from eval.systems import OURS as OURS_SYSTEM
from eval.systems import build, prepare
from hybrimoe_plugin.core import OFFLOADED, LayerPlan, Routed
from hybrimoe_plugin.policy.costs import CostCurve, CostModel
from hybrimoe_plugin.policy.schedule import Scheduler, exact_plan, make_scheduler
from hybrimoe_plugin.replay.simulator import replay
from hybrimoe_plugin.replay.trace import Trace

MACHINES = {
    # The only public trace of the paper's machine (constants in the authors' code, milliseconds by
    # their size).
    "paper's constants": CostModel(
        CostCurve((1, 2), (1790, 2790)), 0, CostCurve((1,), (500,)), 0, 418
    ),
    "fast link": CostModel(
        CostCurve((1, 2, 64), (800, 900, 9000)), 200, CostCurve((1, 64), (60, 90)), 20, 250
    ),
    "slow link": CostModel(
        CostCurve((1, 2, 64), (400, 450, 5000)), 100, CostCurve((1, 64), (60, 90)), 20, 2500
    ),
    "slow accelerator": CostModel(
        CostCurve((1, 2, 64), (400, 450, 5000)), 100, CostCurve((1, 64), (350, 900)), 30, 500
    ),
}
NAMES = ("hybrimoe", "greedy", "static", "accelerator_only")
OURS = NAMES[0]


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the question; gives what the JSON line says."""
    args = report.parser(__doc__ or "").parse_args(arguments)
    gaps = gap_rows(60 if args.quick else 400)
    gaps += recorded_rows(30 if args.quick else 400)
    plan_times = time_rows(300 if args.quick else 3000)
    report.show("Gap to the exact optimum (simulated, as a fraction), up to 9 experts", gaps)
    report.show("Plan time (measured, microseconds)", plan_times)
    report.save_csv(args.out / "schedule_gap.csv", gaps)
    report.save_csv(args.out / "schedule_time.csv", plan_times)
    report.save_figure(args.out / "schedule.png", lambda axes: _draw(axes, gaps))
    ours = [row for row in gaps if row["scheduler"] == OURS]
    result = {
        "plan_us_decode_p50": plan_times[0]["p50"],
        "plan_us_prefill_p50": plan_times[1]["p50"],
        "gap_mean": statistics.mean(row["gap_mean"] for row in ours),
        "gap_max": max(row["gap_max"] for row in ours),
    }
    report.finish(result)
    return result


def gap_rows(cases: int) -> list[dict[str, Any]]:
    """One row for each machine, kind of call and scheduler."""
    rows = []
    for machine, costs in MACHINES.items():
        for kind in ("decode", "small prefill", "in flight"):
            rng = np.random.default_rng(0)
            rows += compared(machine, kind, costs, [random_call(rng, kind) for _ in range(cases)])
    return rows


def recorded_rows(cases: int, tokens: int = 24) -> list[dict[str, Any]]:
    """The same for decode calls as they came up in replays of the real traces, with what was
    resident or under way.
    """
    rows = []
    for name in traces.REAL:
        trace = traces.real(name)
        for machine in ("a6000", "rtx4090-desktop", "laptop-8gb"):
            costs = traces.costs_for(machine, trace, name)
            made = build(OURS_SYSTEM, trace, costs, 0.25, None)
            seen = made.schedulers.decode = Listener(made.schedulers.decode)
            first = Trace(trace.header, trace.calls[: (tokens + 1) * trace.header.layers])
            replay(prepare(OURS_SYSTEM, first, 0.79), made)
            picked = np.random.default_rng(0).permutation(len(seen.calls))[:cases]
            rows += compared(
                machine, f"recorded, {name}", costs, [seen.calls[index] for index in picked]
            )
    return rows


class Listener:
    """A scheduler that remembers the calls it planned."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.name = scheduler.name
        self._scheduler = scheduler
        self.calls: list[tuple[Sequence[Routed], float]] = []

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        self.calls.append((routed, link_free_us))
        return self._scheduler.plan(routed, link_free_us)


def compared(
    machine: str, kind: str, costs: CostModel, calls: Sequence[tuple[Sequence[Routed], float]]
) -> list[dict[str, Any]]:
    """One row for each scheduler: how far its plans are from the best ones."""
    best = [exact_plan(routed, costs, link).makespan_us for routed, link in calls]
    rows = []
    for name in NAMES:
        scheduler = make_scheduler(name, costs, True)
        plans = (scheduler.plan(routed, link).makespan_us for routed, link in calls)
        gaps = [found / optimum - 1 for found, optimum in zip(plans, best, strict=True)]
        row = {"machine": machine, "calls": kind, "scheduler": name}
        rows.append({**row, "gap_mean": statistics.mean(gaps), "gap_max": max(gaps)})
    return rows


def random_call(rng: np.random.Generator, kind: str) -> tuple[list[Routed], float]:
    """(routed experts, when the link is free)."""
    routed = []
    for expert in range(int(rng.integers(2, 10))):
        load = 1 if kind == "decode" else int(rng.choice([1, 1, 2, 3, 5, 8, 20]))
        state = float(rng.choice([0.0, OFFLOADED, OFFLOADED]))
        if kind == "in flight" and rng.random() < 0.3:
            state = float(rng.uniform(1, 1500))
        routed.append(Routed(expert, load, state))
    return routed, max(
        (item.ready_us for item in routed if item.ready_us != OFFLOADED), default=0.0
    )


def time_rows(repeats: int) -> list[dict[str, Any]]:
    """Plan time in decode (8 of 256 experts) and in prefill (all of 256)."""
    rng = np.random.default_rng(0)
    ids = rng.choice(256, 8, replace=False).tolist()
    decode = [
        [Routed(e, 1, 0.0 if (i + s) % 3 == 0 else OFFLOADED) for i, e in enumerate(ids)]
        for s in range(3)
    ]
    flying = [
        [item._replace(ready_us=150.0) if i == s else item for i, item in enumerate(decode[s])]
        for s in range(3)
    ]
    loads = rng.integers(1, 60, (3, 256)).tolist()
    prefill = [
        [Routed(e, load, 0.0 if e % 4 == 0 else OFFLOADED) for e, load in enumerate(row)]
        for row in loads
    ]
    rows = []
    questions = (
        ("decode, 8 of 256", decode, repeats),
        ("prefill, 256 of 256", prefill, repeats // 10),
        ("decode, one under way", flying, repeats),
    )
    for name, calls, count in questions:
        for scheduler in (OURS, "greedy"):
            made = [make_scheduler(scheduler, costs, True) for costs in MACHINES.values()]
            spent = [us for one in made for us in plan_times(one, calls, count)]
            low, middle, high = (float(value) for value in np.percentile(spent, (20, 50, 80)))
            rows.append(
                {"call": name, "scheduler": scheduler, "p20": low, "p50": middle, "p80": high}
            )
    return sorted(rows, key=lambda row: row["scheduler"] != OURS)


def plan_times(scheduler: Scheduler, calls: Sequence[Sequence[Routed]], count: int) -> list[float]:
    spent = []
    for turn in range(count):
        routed = calls[turn % len(calls)]
        started = time.perf_counter_ns()
        scheduler.plan(routed)
        spent.append((time.perf_counter_ns() - started) / 1e3)
    return spent


def _draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    for index, name in enumerate(NAMES):
        mine = [
            [row["gap_mean"] for row in rows if (row["machine"], row["scheduler"]) == (m, name)]
            for m in machines
        ]
        places = [at + index * 0.2 for at in range(len(machines))]
        axes.bar(places, [100 * statistics.mean(values) for values in mine], 0.2, label=name)
    axes.set_xticks([at + 0.3 for at in range(len(machines))], machines, fontsize=7, rotation=15)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylabel("mean gap to the exact optimum, % (simulated)")
    axes.legend()


if __name__ == "__main__":
    main()
