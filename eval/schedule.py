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

from eval.policies import schedule_rows, traces
from eval.policies.calls import Call, decode_calls, in_flight_calls, prefill_calls, random_call
from eval.policies.systems import OURS as OURS_SYSTEM
from eval.policies.systems import build, prepare
from eval.reporting import plots, report
from eval.reporting.quantiles import percentiles
from eval.reporting.rows import column, distinct, where
from hybrimoe_plugin.core import LayerPlan, Routed
from hybrimoe_plugin.policy.costs import CostCurve, CostModel
from hybrimoe_plugin.policy.schedule import Scheduler, exact_plan, make_scheduler
from hybrimoe_plugin.replay.simulator import replay
from hybrimoe_plugin.replay.trace import Trace

ACCELERATOR = CostCurve((1, 64), (60, 90))
MACHINES = {
    # The only public trace of the paper's machine (constants in the authors' code, milliseconds by
    # their size).
    "paper's constants": CostModel(
        cpu=CostCurve((1, 2), (1790, 2790)),
        cpu_first_us=0,
        accelerator=CostCurve((1,), (500,)),
        accelerator_first_us=0,
        transfer_us=418,
    ),
    "fast link": CostModel(
        cpu=CostCurve((1, 2, 64), (800, 900, 9000)),
        cpu_first_us=200,
        accelerator=ACCELERATOR,
        accelerator_first_us=20,
        transfer_us=250,
    ),
    "slow link": CostModel(
        cpu=CostCurve((1, 2, 64), (400, 450, 5000)),
        cpu_first_us=100,
        accelerator=ACCELERATOR,
        accelerator_first_us=20,
        transfer_us=2500,
    ),
    "slow accelerator": CostModel(
        cpu=CostCurve((1, 2, 64), (400, 450, 5000)),
        cpu_first_us=100,
        accelerator=CostCurve((1, 64), (350, 900)),
        accelerator_first_us=30,
        transfer_us=500,
    ),
}
RECORDED_MACHINES = ("a6000", "rtx4090-desktop", "laptop-8gb")
NAMES = ("hybrimoe", "greedy", "static", "accelerator_only")
OURS = NAMES[0]
LABELS = {
    "hybrimoe": "ours",
    "greedy": "greedy, as published",
    "static": "every miss on the CPU",
    "accelerator_only": "load every miss",
}
"""In the figure."""


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the question; gives the contents of the JSON line."""
    args = report.parser(__doc__ or "").parse_args(arguments)
    gaps = gap_rows(60 if args.quick else 400)
    gaps += recorded_rows(30 if args.quick else 400)
    plan_times = time_rows(300 if args.quick else 3000)
    few_gaps = schedule_rows.gap_rows(6 if args.quick else 100)
    few_times = schedule_rows.time_rows(24 if args.quick else 240)
    report.show("Gap to the exact optimum (simulated, as a fraction), up to 9 experts", gaps)
    report.show("Plan time (measured, microseconds)", plan_times)
    report.show("Gap to the optimum of calls of a few rows (simulated, as a fraction)", few_gaps)
    report.show("Time to plan calls of 16 rows (measured, microseconds)", few_times)
    report.save_csv(args.out / "schedule_gap.csv", gaps)
    report.save_csv(args.out / "schedule_time.csv", plan_times)
    report.save_csv(args.out / "schedule_few_rows_gap.csv", few_gaps)
    report.save_csv(args.out / "schedule_few_rows_time.csv", few_times)
    report.save_figure(args.out / "schedule.png", lambda axes: draw(axes, gaps))
    ours = where(gaps, scheduler=OURS)
    decode, prefill = plan_times[:2]
    few = where(few_gaps, planner="ours")
    few_plans = where(few_times, planner="ours", asked="plan")
    result = {
        "plan_us_decode_p50": decode["p50"],
        "plan_us_prefill_p50": prefill["p50"],
        "gap_mean": statistics.mean(column(ours, "gap_mean")),
        "gap_max": max(column(ours, "gap_max")),
        "plan_us_p50_16_rows": max(column(few_plans, "p50")),
        "gap_few_rows_mean": statistics.mean(column(few, "gap_mean")),
        "gap_few_rows_worst": max(column(few, "gap_worst")),
    }
    report.finish(result)
    return result


def gap_rows(cases: int) -> list[dict[str, Any]]:
    """One row for each machine, kind of call and scheduler."""
    rows = []
    for machine, costs in MACHINES.items():
        for kind in ("decode", "small prefill", "in flight"):
            rng = np.random.default_rng(0)
            calls = [random_call(rng, kind) for _ in range(cases)]
            rows += compared(machine, kind, costs, calls)
    return rows


def recorded_rows(cases: int, tokens: int = 24) -> list[dict[str, Any]]:
    """The same for decode calls as they came up in replays of the real traces.

    Experts are resident or in flight as they were then.
    """
    rows = []
    for name in traces.REAL:
        trace = traces.real(name)
        for machine in RECORDED_MACHINES:
            costs = traces.costs_for(machine, trace, name)
            calls = planned_calls(trace, costs, tokens)
            picked = np.random.default_rng(0).permutation(len(calls))[:cases]
            some = [calls[index] for index in picked]
            rows += compared(machine, f"recorded, {name}", costs, some)
    return rows


def planned_calls(trace: Trace, costs: CostModel, tokens: int) -> list[Call]:
    """The decode calls that our controller plans in a replay of the first tokens."""
    controller = build(OURS_SYSTEM, trace, costs, 0.25, None)
    listener = Listener(controller.schedulers.decode)
    controller.schedulers.decode = listener
    count = (tokens + 1) * trace.header.layers
    first = Trace(trace.header, trace.calls[:count])
    replay(prepare(OURS_SYSTEM, first, 0.79), controller)
    return listener.calls


class Listener(Scheduler):
    """A scheduler that remembers the calls it planned."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.name = scheduler.name
        self._scheduler = scheduler
        self.calls: list[Call] = []

    def plan(self, routed: Sequence[Routed], link_free_us: float = 0.0) -> LayerPlan:
        self.calls.append(Call(routed, link_free_us))
        return self._scheduler.plan(routed, link_free_us)


def compared(
    machine: str,
    kind: str,
    costs: CostModel,
    calls: Sequence[Call],
) -> list[dict[str, Any]]:
    """One row for each scheduler: how far its plans are from the best ones."""
    best = [exact_plan(call.routed, costs, call.link_free_us).makespan_us for call in calls]
    rows = []
    for name in NAMES:
        scheduler = make_scheduler(name, costs, True)
        gaps = []
        for call, optimum in zip(calls, best, strict=True):
            plan = scheduler.plan(call.routed, call.link_free_us)
            gaps.append(plan.makespan_us / optimum - 1)
        rows.append(
            {
                "machine": machine,
                "calls": kind,
                "scheduler": name,
                "gap_mean": statistics.mean(gaps),
                "gap_max": max(gaps),
            }
        )
    return rows


def time_rows(repeats: int) -> list[dict[str, Any]]:
    """Plan time in decode (8 of 256 experts) and in prefill (all of 256)."""
    rng = np.random.default_rng(0)
    decode = decode_calls(rng)
    prefill = prefill_calls(rng)
    questions = (
        ("decode, 8 of 256", decode, repeats),
        ("prefill, 256 of 256", prefill, repeats // 10),
        ("decode, one under way", in_flight_calls(decode), repeats),
    )
    rows = []
    for scheduler in (OURS, "greedy"):
        for name, calls, count in questions:
            spent: list[float] = []
            for costs in MACHINES.values():
                spent += plan_times(make_scheduler(scheduler, costs, True), calls, count)
            low, middle, high = percentiles(spent)
            row = {"call": name, "scheduler": scheduler}
            rows.append({**row, "p20": low, "p50": middle, "p80": high})
    return rows


def plan_times(scheduler: Scheduler, calls: Sequence[Sequence[Routed]], count: int) -> list[float]:
    """Wall time of `count` plans in us."""
    spent = []
    for turn in range(count):
        routed = calls[turn % len(calls)]
        started = time.perf_counter_ns()
        scheduler.plan(routed)
        spent.append((time.perf_counter_ns() - started) / 1e3)
    return spent


def draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Mean gap by machine, a dot for each scheduler."""
    machines = distinct(rows, "machine")
    series = []
    for name in NAMES:
        times = []
        for machine in machines:
            found = column(where(rows, machine=machine, scheduler=name), "gap_mean")
            times.append(1 + statistics.mean(found))
        colour = plots.OURS if name == OURS else plots.OTHER
        series.append(plots.Series(LABELS[name], times, colour))
    plots.dots(axes, machines, series, log=True)
    ticks = (1, 1.5, 2, 3, 4, 6)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    # Rounding can give less than nothing.
    ours = max(0.0, statistics.mean(column(where(rows, scheduler=OURS), "gap_mean")))
    axes.set_title(f"Our plans are within {100 * ours:.4f} % of the best possible ones")
    axes.set_xlabel("time of a layer over that of the exact optimum, mean over calls (simulated)")


if __name__ == "__main__":
    main()
