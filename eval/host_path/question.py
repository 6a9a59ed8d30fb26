"""What does decoding on a GPU cost the host, layer by layer?

Measured without a GPU. The plugin's own code for CUDA runs on a driver that does nothing: streams,
events and graphs are fakes, tensors of the device hold no data, kernels and the CPU's experts
compute nothing. So the times are those of Python and torch on the host alone. The device is always
done when it is asked; what starting a real kernel, copy or graph costs in Triton and in the driver
is not in them.

Each layer call of a token hits in all of its 8 experts, or misses one, which the plan computes on
the CPU or loads. Two ways are measured: `wait` reads the routing of each layer before it goes on
(`host_path: wait`), `chain` launches layers ahead and puts right what missed.

Whole calls are timed with nothing watched. Times of parts come from other tokens, and what the
watch costs is subtracted. A part contains the parts that it calls, so they do not add up. 0 means
that a part did not run, a blank that this way has no such part.

One token in which all layers hit is recorded, with every call of the driver, and the calls that
make the host wait for the device (round trips) are counted in that trace; then another one on a
device whose events are never reached when they are asked. On such a device it is checked, too, that
events order all uses of the same bytes of a slot.

In the last line, times are the worst medians of 128 and 256 experts, in us. `decide` is the time
from the routing decision on the host to the first kernel or CPU task, `decide_us_miss` the same
where an expert is loaded first. Those of the twin begin with `wait_`. `quiet` is false where other
programs used the processor meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.host_path import onload, order, trace
from eval.host_path.measure import (
    DECIDE,
    ROWS,
    TOKEN,
    WHOLE,
    Runner,
    Times,
    decisions,
    few_rows,
    parts,
    quiet,
    token_means,
    whole_calls,
)
from eval.host_path.paths import CHAIN, PATHS, WAIT, settings
from eval.host_path.routing import CASES, SETTLING, Case
from eval.host_path.subject import Subject, subject
from eval.reporting import plots, report
from eval.reporting.progress import Planned, Progress
from eval.reporting.quantiles import percentiles
from eval.reporting.rows import distinct, where
from hybrimoe_plugin.device.noise import Noise

EXPERTS = (64, 128, 256)
JUDGED = EXPERTS[1:]
"""Those whose worst median is in the last line."""
LAYERS = {False: 48, True: 8}
ROUNDS = {False: 3, True: 1}
TOKENS = {False: 6, True: 6}
"""In each round, for each case and each kind of measurement."""
ONLOADS = {False: 400, True: 100}
CELL_S = {False: 30.0, True: 5.0}
"""Measured on 2 cores: model and measurements of one number of experts."""

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> Row:
    """Run the question; gives the contents of the JSON line."""
    parser = report.parser(__doc__ or "", "python -m eval.host_path")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--trace", type=Path, help="write the recorded token there, for https://ui.perfetto.dev"
    )
    parser.add_argument("--layers", type=int, help="MoE layers (default 48; quick: 8)")
    args = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operations: more threads only wait for one another
    try:
        return run(args)
    finally:
        torch.set_num_threads(threads)


def run(args: argparse.Namespace) -> Row:
    """Measure every path; gives the contents of the JSON line."""
    layers = args.layers or LAYERS[args.quick]
    found: list[Row] = []
    tokens: list[Row] = []
    onloads: list[Row] = []
    several: list[Row] = []
    noise = Noise()
    cells = [(path, experts) for experts in EXPERTS for path in PATHS]
    with Progress({"models": Planned(len(cells), CELL_S[args.quick])}, 0) as progress:
        for path, experts in cells:
            label: Row = {"path": path, "experts": experts, "layers": layers}
            with subject(layers, experts, **settings(path)) as made:
                found += [
                    {**label, "place": f"{experts}: {row['case']}", **row}
                    for row in rows(made, args.quick)
                ]
                token = trace.hit_token(made)
                late = trace.hit_token(made, late=True)
                tokens += [
                    {**label, "events": "reached", **token_row(token)},
                    {**label, "events": "late", **token_row(late)},
                ]
                if path == WAIT:
                    several += few_rows_of(made, experts, args.quick)
                if not onloads:
                    onloads = onload_rows(made, ONLOADS[args.quick])
            if args.trace is not None and experts == EXPERTS[-1]:
                trace.write(trace_path(args.trace, path), token)
            progress.done("models")
        checked = [{"path": path, "uses_in_order": order.checked(path)} for path in PATHS]
    for experts in EXPERTS:
        report.show(f"{experts} experts: host time, us (measured)", side_by_side(found, experts))
    report.show("Sending one expert into a slot: host time, us (measured)", onloads)
    report.show("A layer call of a few rows, without graphs: host time, us (measured)", several)
    report.show("A token in which every layer hits: driver calls in its trace", tokens)
    report.show("Uses of slots whose order events guarantee, on a late device", checked)
    verdict = noise.verdict()
    print(verdict or "The machine was quiet.")
    report.save_csv(args.out / "host_path.csv", found)
    report.save_csv(args.out / "host_path_onload.csv", onloads)
    report.save_csv(args.out / "host_path_rows.csv", several)
    report.save_csv(args.out / "host_path_token.csv", tokens)
    report.save_figure(args.out / "host_path.png", lambda axes: draw(axes, found))
    result = summary(found, onloads, tokens)
    result |= {"layers": layers, "quiet": not verdict}
    report.finish(result)
    return result


def rows(made: Subject, quick: bool) -> list[Row]:
    """A row for each case and part; rounds mix the cases, as a machine's noise comes and goes."""
    runner = Runner(made)
    samples: dict[Case, dict[str, list[float]]] = {case: {} for case in CASES}
    others = dict.fromkeys(CASES, 0)
    with quiet():
        whole_calls(runner, CASES[0], SETTLING)
        for _ in range(ROUNDS[quick]):
            for case in CASES:
                whole_calls(runner, case, case.settling)
                for times in measured(made, runner, case, TOKENS[quick]):
                    others[case] += times.others
                    for name, us in times.parts.items():
                        samples[case].setdefault(name, []).extend(us)
    return [
        {"case": case.name, "part": name, **quantiles(us), "left_out": others[case]}
        for case, found in samples.items()
        for name, us in found.items()
    ]


def measured(made: Subject, runner: Runner, case: Case, tokens: int) -> Iterator[Times]:
    """Every kind of measurement of a case; of one with different layer calls only the mean."""
    yield token_means(runner, case, tokens)
    if case.every == 1:
        yield whole_calls(runner, case, tokens)
        yield decisions(made, runner, case, tokens)
        yield parts(made, runner, case, tokens)


def quantiles(us: Sequence[float]) -> Row:
    """Columns of a row."""
    low, middle, high = percentiles(us)
    return {"p20_us": low, "p50_us": middle, "p80_us": high, "calls": len(us)}


def onload_rows(made: Subject, count: int) -> list[Row]:
    """A row for each type."""
    return [{"type": name, **quantiles(onload.times(made, name, count))} for name in onload.TYPES]


def few_rows_of(made: Subject, experts: int, quick: bool) -> list[Row]:
    """A row for each number of rows; whole calls, the routing read already."""
    found = []
    with quiet():
        for rows in ROWS:
            us = few_rows(made, rows, TOKENS[quick])
            found.append({"experts": experts, "rows": rows, **quantiles(us)})
    return found


def token_row(token: trace.HitToken) -> Row:
    """What a recorded token asked of the driver."""
    return {
        "calls": len(token.forward),
        "round_trips": token.round_trips,
        "sampling_round_trips": len(trace.stops(token.sampling)),
    }


def trace_path(path: Path, name: str) -> Path:
    """One file for each path."""
    return path.with_stem(f"{path.stem}_{name}")


def side_by_side(found: Sequence[Row], experts: int) -> list[Row]:
    """The table of one number of experts: a row for each part, the paths beside each other."""
    shown: dict[tuple[str, str], Row] = {}
    blank = {f"{path}_p{share}": "" for path in PATHS for share in (20, 50, 80)}
    for row in where(found, experts=experts):
        key = row["case"], row["part"]
        made = shown.setdefault(key, {"case": key[0], "part": key[1], **blank})
        for share in (20, 50, 80):
            made[f"{row['path']}_p{share}"] = row[f"p{share}_us"]
    return list(shown.values())


def draw(axes: Any, found: Sequence[Row]) -> None:
    """Median of a whole layer call by case and number of experts, a dot for each path."""
    whole = where(found, part=WHOLE)
    places = distinct(whole, "place")
    series = []
    for path in PATHS:
        medians = [where(whole, path=path, place=place)[0]["p50_us"] for place in places]
        colour = plots.OURS if path == CHAIN else plots.OTHER
        series.append(plots.Series(path, medians, colour))
    plots.dots(axes, places, series)
    most = max(row["p50_us"] for row in whole)
    axes.set_title(f"A layer call takes the host up to {most:.0f} µs on a device that takes none")
    axes.set_xlabel("host time of a layer call, median, µs (measured)")


def summary(found: Sequence[Row], onloads: Sequence[Row], tokens: Sequence[Row]) -> Row:
    """The last line: the worst medians of the chain, and of its twin."""
    result: Row = {"path": CHAIN, **worst(found, tokens, CHAIN)}
    result["onload_us"] = round(max(row["p50_us"] for row in onloads), 1)
    result |= {f"{WAIT}_{name}": us for name, us in worst(found, tokens, WAIT).items()}
    return result


def worst(found: Sequence[Row], tokens: Sequence[Row], path: str) -> Row:
    """The worst median among `JUDGED`, of the cases that each figure is about."""

    def median(part: str, cases: Sequence[Case]) -> float:
        names = {case.name for case in cases}
        chosen = [
            row["p50_us"]
            for row in where(found, path=path, part=part)
            if row["experts"] in JUDGED and row["case"] in names
        ]
        return round(max(chosen, default=0.0), 1)

    pure = [case for case in CASES if case.every == 1]
    mixed = [case for case in CASES if case.every > 1]
    loading = [case for case in pure if case.loads]
    others = [case for case in pure if not case.loads]
    return {
        "decide_us_p50": median(DECIDE, others),
        "decide_us_miss_p50": median(DECIDE, loading),
        "layer_us_p50": max(median(WHOLE, pure), median(TOKEN, mixed)),
        "host_round_trips_per_hit_token": max(
            row["round_trips"] for row in where(tokens, path=path)
        ),
    }
