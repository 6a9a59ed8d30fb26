"""How long do calls of a few rows take, by system and number of rows? Every time is simulated.

The rows are those of conversations that a server decodes together, or the nodes of a draft's token
tree that is verified in one pass. The engine's own controller runs over routing traces and machine
profiles. All systems start with the same experts resident, placed by other text; the first half of
the steps warms the policies up and the second half is judged. Comparisons that end near level are
repeated from further starts, the same for both systems, and their mean is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from eval.policies import few_rows, traces
from eval.policies.few_rows import KINDS, TREE
from eval.policies.systems import KTRANSFORMERS, ORACLE, OURS, System, build, prepare
from eval.prefetch import standard_error
from eval.replay import BASELINE_NAMES, MACHINES, RECALL, SYSTEMS, mean
from eval.reporting import plots, report
from eval.reporting.parallel import mapped
from eval.reporting.rows import column, distinct, where, within
from hybrimoe_plugin.replay.simulator import replay

STEPS = {1: 48, 2: 32, 4: 32, 8: 24, 16: 16, 32: 16}
"""Rows a call -> steps, half of which are judged; each step of many rows teaches a cache more."""
QUICK_STEPS = 8
RATIOS = (0.25, 0.5)
NEAR = 0.01
"""A difference between two systems that one start cannot tell from chance: starts differ in the
routing too, which makes about 0.5 % of standard deviation.
"""
STARTS = 5
"""Starts of such a comparison: each with other texts, stretches or trees, experts placed by another
text, and other errors of the predictions.
"""
BEHIND = 0.002
"""Largest difference that counts as level."""
RECORDED_MACHINES = ("a6000", "rtx4090-desktop", "laptop-8gb")
TRACES = (*traces.FLAT, *traces.REAL, *traces.RECORDED)
PROFILES = ("a6000", "constants", "rtx4090-desktop", "laptop-8gb")
QUICK = ("deepseek-v2-lite", "a6000", 0.25)
QUICK_ROWS = (1, 2, 8, 32)

Row = dict[str, Any]


class Cell(NamedTuple):
    """Where systems are compared."""

    trace: str
    profile: str
    """Name of the machine's profile."""
    ratio: float
    """Share of the experts that are cached."""
    kind: str
    rows: int
    steps: int
    starts: int
    """Of comparisons that end near level."""


class Timed(NamedTuple):
    """What one system did in one cell, from one start."""

    call_us: float
    """Mean time of a judged layer call."""
    token_us: float
    """Mean time of a judged pass, divided by `tokens`."""
    tokens: float
    """Mean number of tokens by which all texts together grow in a pass, judged or not."""
    resident: float
    """Share of the needed experts that were resident, in judged passes."""
    link_bytes: float
    """Bytes across the link in judged passes, for each token by which a text grows."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives the contents of the JSON line."""
    parser = report.parser(__doc__ or "")
    add = parser.add_argument
    add("--rows", nargs="+", type=int, default=tuple(STEPS), choices=STEPS, help="rows a call")
    add("--kinds", nargs="+", default=KINDS, choices=KINDS, help="whose rows")
    add("--traces", nargs="+", default=TRACES, choices=TRACES, help="routing to replay")
    add("--profiles", nargs="+", default=PROFILES, choices=PROFILES, help="machines to replay")
    add("--ratios", nargs="+", type=float, default=RATIOS, choices=RATIOS, help="shares cached")
    args = parser.parse_args(arguments)
    if args.quick:
        trace, profile, ratio = QUICK
        args.traces, args.profiles, args.ratios, args.rows = [trace], [profile], [ratio], QUICK_ROWS
    jobs = [cell for cell in all_cells(args.quick) if _is_asked(cell, args)]
    if not jobs:
        parser.error("no cell has these traces, profiles, ratios, kinds and rows together")
    found = mapped(compared, jobs, "cells")
    rows = [row for part in found for row in part]
    summed = [summary_of(part) for part in found]
    report.show("Calls of a few rows (simulated): each cell's nearest baseline", summed)
    report.show("By rows, all cells (simulated)", by_rows(rows))
    report.save_csv(args.out / "rows.csv", rows)
    report.save_csv(args.out / "rows_cells.csv", summed)
    report.save_figure(args.out / "rows.png", lambda axes: draw(axes, summed))
    result = summary(rows)
    report.finish(result)
    return result


def all_cells(quick: bool) -> Iterator[Cell]:
    """Every cell; one row is the same for both kinds."""
    for name in TRACES:
        for profile in MACHINES.get(name, RECORDED_MACHINES):
            for ratio in RATIOS:
                for kind in KINDS:
                    for rows, steps in STEPS.items():
                        if rows == 1 and kind == TREE:
                            continue
                        many, starts = (QUICK_STEPS, 2) if quick else (steps, STARTS)
                        yield Cell(name, profile, ratio, kind, rows, many, starts)


def _is_asked(cell: Cell, args: Any) -> bool:
    """Whether the command's filters leave a cell in."""
    return (
        cell.trace in args.traces
        and cell.profile in args.profiles
        and cell.ratio in args.ratios
        and cell.kind in args.kinds
        and cell.rows in args.rows
    )


def compared(cell: Cell) -> list[Row]:
    """One row for each system."""
    first = {system.name: timed(cell, system, 0) for system in SYSTEMS}
    mine = [first[OURS.name]]
    rows = []
    for system in SYSTEMS:
        theirs = [first[system.name]]
        if system.name in BASELINE_NAMES and is_near(theirs[0], mine[0]):
            mine += [timed(cell, OURS, start) for start in range(len(mine), cell.starts)]
            theirs += [timed(cell, system, start) for start in range(1, cell.starts)]
        rows.append(row_of(cell, system, theirs, mine))
    return rows


def is_near(theirs: Timed, mine: Timed) -> bool:
    """Whether one start cannot tell which is faster."""
    return abs(theirs.call_us / mine.call_us - 1.0) < NEAR


def timed(cell: Cell, system: System, start: int) -> Timed:
    """One system from one start; ratios are taken of systems from the same start."""
    trace = few_rows.routing(cell.trace, cell.kind, cell.rows, cell.steps, start)
    whole = trace if cell.trace in traces.SHAPES else traces.real(cell.trace)
    popularity = traces.other_text(whole, cell.trace, start)
    costs = traces.costs_for(cell.profile, trace, cell.trace)
    controller = build(system, trace, costs, cell.ratio, popularity)
    skip = cell.steps // 2
    found = replay(prepare(system, trace, RECALL, start), controller, skip)
    pass_us = fmean(found.decode_us)
    # Of all passes: what a few of a draft's trees gain is chance, the same for all systems.
    tokens = fmean(few_rows.gained(group) for group in trace.passes())
    return Timed(
        pass_us / trace.header.layers,
        pass_us / tokens,
        tokens,
        found.resident_rate,
        found.decode_counters.link_bytes / len(found.decode_us) / tokens,
    )


def row_of(cell: Cell, system: System, theirs: Sequence[Timed], mine: Sequence[Timed]) -> Row:
    """Times of the first start, and what ours gains over all of them.

    Args:
        theirs: of this system, one for each start.
        mine: of ours; from as many starts, or more.
    """
    ratios = [one.call_us / other.call_us for one, other in zip(theirs, mine, strict=False)]
    first = theirs[0]
    return {
        "trace": cell.trace,
        "profile": cell.profile,
        "cache": cell.ratio,
        "kind": cell.kind,
        "rows": cell.rows,
        "system": system.name,
        "call us": first.call_us,
        "token ms": first.token_us / 1e3,
        "ours speedup": fmean(ratios),
        "starts": len(theirs),
        "standard error": standard_error(ratios),
        "tokens a pass": first.tokens,
        "resident": first.resident,
        "MB per token": first.link_bytes / 1e6,
        "steps": cell.steps,
    }


def summary_of(rows: Sequence[Row]) -> Row:
    """One line for a cell: its nearest baseline, and ours as a share of the oracle's speed."""
    nearest = min(within(rows, "system", BASELINE_NAMES), key=lambda row: row["ours speedup"])
    mine = where(rows, system=OURS.name)[0]
    wanted = ("trace", "profile", "cache", "kind", "rows", "call us", "token ms")
    return {
        **{name: mine[name] for name in wanted},
        "speedup": nearest["ours speedup"],
        "over": nearest["system"],
        "over static": speedup(rows, KTRANSFORMERS),
        "of oracle": speedup(rows, ORACLE),
        "starts": nearest["starts"],
        "standard error": nearest["standard error"],
    }


def by_rows(rows: Sequence[Row]) -> list[Row]:
    """One line for each kind and row count, over all cells."""
    found = []
    for kind in KINDS:
        for count in distinct(where(rows, kind=kind), "rows"):
            some = where(rows, kind=kind, rows=count)
            baselines = within(some, "system", BASELINE_NAMES)
            speedups = column(baselines, "ours speedup")
            found.append(
                {
                    "kind": kind,
                    "rows": count,
                    "over static": speedup(some, KTRANSFORMERS),
                    "worst cell": min(speedups),
                    "comparisons": len(speedups),
                    "behind": sum(value < 1.0 - BEHIND for value in speedups),
                    "of oracle": speedup(some, ORACLE),
                    "least of oracle": min(column(where(some, system=ORACLE.name), "ours speedup")),
                }
            )
    return found


def speedup(rows: Sequence[Row], system: System) -> float:
    """Geometric mean of ours over a system."""
    return mean(column(where(rows, system=system.name), "ours speedup"))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The JSON line."""
    baselines = within(rows, "system", BASELINE_NAMES)
    lowest = min(baselines, key=lambda row: float(row["ours speedup"]))
    place = [str(lowest[name]) for name in ("trace", "profile", "cache", "kind", "rows", "system")]
    result: dict[str, Any] = {
        "worst_cell_vs_any_baseline": lowest["ours speedup"],
        "worst_standard_error": lowest["standard error"],
        "worst_cell": ", ".join(place),
        "behind": sum(row["ours speedup"] < 1.0 - BEHIND for row in baselines),
        "comparisons": len(baselines),
    }
    counts = distinct(rows, "rows")
    for count in counts:
        result[f"speedup_over_static_{count}_rows"] = speedup(
            where(rows, rows=count), KTRANSFORMERS
        )
    for count in counts:
        result[f"oracle_share_{count}_rows"] = speedup(where(rows, rows=count), ORACLE)
    return result


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Speed over static by row count: ours and the oracle, a line for each kind.

    Args:
        rows: one for each cell, as `summary_of` makes them.
    """
    ends = []
    gains: list[float] = []
    for kind, dash in zip(KINDS, plots.DASHES, strict=False):
        # One row is the same for both kinds.
        chosen = [cell for cell in rows if cell["rows"] == 1 or cell["kind"] == kind]
        counts = distinct(chosen, "rows")
        some = [where(chosen, rows=count) for count in counts]
        ours = [mean(column(part, "over static")) for part in some]
        shares = [mean(column(part, "of oracle")) for part in some]
        best = [gain / share for gain, share in zip(ours, shares, strict=True)]
        gains += ours
        for name, speeds, colour in (("ours", ours, plots.OURS), ("oracle", best, plots.LIMIT)):
            axes.plot(counts, speeds, color=colour, linestyle=dash, marker="o")
            ends += [(f"{name}, {kind}", value, colour) for value in speeds[-1:]]
    axes.axhline(1.0, color=plots.OTHER, linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = distinct(rows, "rows")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    plots.label_ends(axes, ends)
    least, most = min(gains), max(gains)
    axes.set_title(f"Ours runs {least:.2f}x to {most:.2f}x as fast as a fixed placement of experts")
    axes.set_xlabel("rows of a call")
    axes.set_ylabel("speed over a fixed placement\n(simulated)")


if __name__ == "__main__":
    main()
