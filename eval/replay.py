"""How long do prefill and decode take, by system, cache ratio and machine? Every time is simulated.

The engine's own controller runs over routing traces and machine profiles. All systems start with
the same experts resident, placed by other text; the first half of each answer warms the policies up
and the second half is judged. Comparisons that end near level are repeated from further starts, the
same for both systems, and their mean is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from eval.policies import traces
from eval.policies.systems import (
    ABLATION,
    BASELINES,
    KTRANSFORMERS,
    LEARNING_FIRST,
    ORACLE,
    OURS,
    PUBLISHED,
    SINGLE,
    System,
    build,
    prepare,
    prompt_of,
)
from eval.reporting import plots, report
from eval.reporting.parallel import mapped
from eval.reporting.rows import column, where, within
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
BASELINE_NAMES = frozenset(system.name for system in BASELINES)
STEPS = (*ABLATION, LEARNING_FIRST, *SINGLE, PUBLISHED, ORACLE)
"""The ablation: each step on top of the one before, the last one with every call learned from
before it is planned, then single parts on the static baseline, then the paper's own system.
"""

PHASES = ("decode", "prefill")

Row = dict[str, Any]


class Place(NamedTuple):
    """Where systems are compared."""

    trace: str
    profile: str
    """Name of the machine's profile."""
    ratio: float
    """Share of the experts that are cached."""

    @classmethod
    def of(cls, row: Row) -> Place:
        """Where a row's system was run."""
        return cls(row["trace"], row["profile"], row["cache"])


class Job(NamedTuple):
    """One system in one place."""

    place: Place
    system: System
    tokens: int
    """Decode tokens of generated routing."""
    lengths: bool
    """Whether prompts of all lengths are timed."""


ABLATED = Place("qwen2-57b-a14b", "a6000", 0.25)
Start = tuple[Job, int]
"""A job, and from which start it is run."""
Times = tuple[float, float]
"""Of decode and of prefill, in us."""


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the question; gives the contents of the JSON line."""
    args = report.parser(__doc__ or "").parse_args(arguments)
    tokens = 24 if args.quick else 128
    jobs = list(all_jobs(tokens, args.quick))
    rows = mapped(cell, jobs)
    compare(rows)
    repeat(rows, jobs, 2 if args.quick else STARTS)
    steps = mapped(cell, [Job(ABLATED, system, tokens, lengths=False) for system in STEPS])
    base = steps[0]
    for row in steps:
        for phase in PHASES:
            row[f"{phase} speedup"] = base[f"{phase} ms"] / row[f"{phase} ms"]
    report.show("Time per pass (simulated)", where(rows, profile="a6000"))
    report.show(
        "Ablation: Qwen2-57B-A14B, flat routing, 25 % cached, the paper's machine (simulated)",
        steps,
    )
    report.save_csv(args.out / "replay.csv", rows)
    report.save_csv(args.out / "replay_ablation.csv", steps)
    report.save_figure(args.out / "replay.png", lambda axes: draw(axes, rows), width=9.0)
    result = summary(rows)
    report.finish(result)
    return result


def all_jobs(tokens: int, quick: bool) -> Iterator[Job]:
    """Every cell of the question; a quick run takes the first machine alone."""
    for name in (*traces.FLAT, *traces.REAL):
        machines = MACHINES[name]
        for machine in machines[:1] if quick else machines:
            lengths = not quick and machine in PAPER
            for ratio in RATIOS:
                place = Place(name, machine, ratio)
                for system in SYSTEMS:
                    yield Job(place, system, tokens, lengths)


class Subject:
    """One job's trace, and its system as it replays routing.

    Args:
        start: which other text places the first experts.
    """

    def __init__(self, job: Job, start: int = 0) -> None:
        name = job.place.trace
        self.job = job
        self.trace = routing(name, job.tokens)
        self._popularity = traces.other_text(self.trace, name, start)
        self._costs = traces.costs_for(job.place.profile, self.trace, name)

    def run(self, trace: Trace, draw: int, skip: int = 0) -> Outcome:
        """Replay some routing.

        Args:
            draw: which of the modelled predictions' errors are drawn.
            skip: decode steps that do not count.
        """
        system = self.job.system
        controller = build(system, trace, self._costs, self.job.place.ratio, self._popularity)
        return replay(prepare(system, trace, RECALL, draw), controller, skip)

    def answer(self, draw: int) -> Outcome:
        """The whole trace; the first half of decode warms up."""
        decode = [group for group in self.trace.passes() if len(group[0].ids) == 1]
        return self.run(self.trace, draw, skip=len(decode) // 2)

    def longer_us(self, draw: int) -> list[float]:
        """Times of prompts of further lengths, where the job wants them; real traces have none."""
        name = self.job.place.trace
        if not self.job.lengths or name not in traces.SHAPES:
            return []
        times: list[float] = []
        for length in PROMPTS:
            calls = traces.flat(name, length, 0, text=1).calls
            times += self.run(Trace(self.trace.header, calls), draw).prefill_us
        return times


def cell(job: Job) -> Row:
    """One system on one trace and machine."""
    subject = Subject(job)
    found = subject.answer(draw=0)
    first = list(found.prefill_us)
    if Settings.of(job.system.settings).prefetch != "off":
        prompt = prompt_of(subject.trace)
        for draw in range(1, DRAWS):
            first += subject.run(prompt, draw).prefill_us
    prefill = [mean(first), *subject.longer_us(draw=0)]
    steps = len(found.decode_us)
    return {
        "trace": job.place.trace,
        "profile": job.place.profile,
        "cache": job.place.ratio,
        "system": job.system.name,
        "decode ms": sum(found.decode_us) / steps / 1e3,
        "prefill ms": mean(prefill) / 1e3,
        "resident": found.resident_rate,
        "MB per token": found.decode_counters.link_bytes / steps / 1e6,
    }


def timed(begun: Start) -> Times:
    """Decode and prefill time of one system from one start.

    Ratios are taken of systems from the same start.
    """
    job, start = begun
    subject = Subject(job, start)
    found = subject.answer(draw=start)
    prefill = found.prefill_us + subject.longer_us(draw=start)
    return sum(found.decode_us), mean(prefill)


def routing(name: str, tokens: int) -> Trace:
    """The trace of a name; a real one has its own length."""
    if name in traces.SHAPES:
        return traces.flat(name, 64, tokens, text=1)
    return traces.real(name)


def compare(rows: Sequence[Row]) -> None:
    """Add what ours gains over each system in its cell. Mutates the rows."""
    ours = {Place.of(row): row for row in where(rows, system=OURS.name)}
    for row in rows:
        mine = ours[Place.of(row)]
        for phase in PHASES:
            row[f"ours {phase} speedup"] = row[f"{phase} ms"] / mine[f"{phase} ms"]


def repeat(rows: Sequence[Row], jobs: Sequence[Job], starts: int) -> None:
    """Time comparisons with baselines that are near level again; give mean and standard error.

    Mutates: the rows.
    """
    near = [row for row in rows if any(is_near(row, phase) for phase in PHASES)]
    times = timed_again(near, jobs, starts)
    repeated = {id(row) for row in near}
    for row in rows:
        for index, phase in enumerate(PHASES):
            again = id(row) in repeated and is_near(row, phase)
            row[f"{phase} starts"] = 1
            row[f"{phase} standard error"] = 0.0
            if not again:
                continue
            place = Place.of(row)
            theirs = times[place, row["system"]]
            mine = times[place, OURS.name]
            ratios = [one[index] / other[index] for one, other in zip(theirs, mine, strict=True)]
            row[f"ours {phase} speedup"] = fmean(ratios)
            row[f"{phase} starts"] = starts
            row[f"{phase} standard error"] = stdev(ratios) / len(ratios) ** 0.5


def timed_again(
    near: Sequence[Row],
    jobs: Sequence[Job],
    starts: int,
) -> dict[tuple[Place, str], list[Times]]:
    """(place, system) -> times from all starts, of ours and the systems that are near it."""
    by_name = {(job.place, job.system.name): job for job in jobs}
    wanted = []
    for row in near:
        place = Place.of(row)
        wanted += [(place, row["system"]), (place, OURS.name)]
    names = list(dict.fromkeys(wanted))
    begun = [(by_name[name], start) for name in names for start in range(starts)]
    found = iter(mapped(timed, begun))
    return {name: [next(found) for _ in range(starts)] for name in names}


def is_near(row: Row, phase: str) -> bool:
    """Whether one start cannot tell if ours is faster than this baseline."""
    if row["system"] not in BASELINE_NAMES:
        return False
    return abs(float(row[f"ours {phase} speedup"]) - 1.0) < NEAR


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """The JSON line."""
    baselines = within(rows, "system", BASELINE_NAMES)
    oracle = where(rows, system=ORACLE.name)
    static = where(rows, system=KTRANSFORMERS.name)
    flat = within(static, "trace", traces.FLAT)
    paper = where(flat, profile="a6000")
    constants = where(flat, profile="constants")
    lowest = min(baselines, key=lambda row: float(row["ours decode speedup"]))
    worst_decode, worst_prefill = worst(baselines, "decode"), worst(baselines, "prefill")
    result = {
        "decode_speedup_geomean": speedup(paper, "decode"),
        "prefill_speedup_geomean": speedup(paper, "prefill"),
        "worst_cell_vs_any_baseline": min(worst_decode, worst_prefill),
        "worst_decode_cell": worst_decode,
        "worst_decode_standard_error": float(lowest["decode standard error"]),
        "worst_prefill_cell": worst_prefill,
        "oracle_share_decode": speedup(oracle, "decode"),
        "oracle_share_prefill": speedup(oracle, "prefill"),
    }
    if constants:
        limit = where(oracle, profile="constants")
        result["constants_decode_speedup_geomean"] = speedup(constants, "decode")
        result["constants_prefill_speedup_geomean"] = speedup(constants, "prefill")
        result["constants_oracle_share_decode"] = speedup(limit, "decode")
    return result


def speedup(rows: Sequence[Row], phase: str) -> float:
    """Geometric mean of ours over the rows' systems."""
    return mean(column(rows, f"ours {phase} speedup"))


def worst(rows: Sequence[Row], phase: str) -> float:
    """Lowest speed-up of ours."""
    return float(min(column(rows, f"ours {phase} speedup")))


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Decode speed over static on the paper's machine, a dot for each system."""
    chosen = where(rows, profile="a6000")
    names = (*traces.FLAT, *traces.REAL)
    base = [_decode_ms(chosen, KTRANSFORMERS, name) for name in names]
    series: list[plots.Series] = []
    for system in SYSTEMS:
        theirs = [_decode_ms(chosen, system, name) for name in names]
        speeds = [mine / other for mine, other in zip(base, theirs, strict=True)]
        colour = {OURS.name: plots.OURS, ORACLE.name: plots.LIMIT}.get(system.name, plots.OTHER)
        series.append(plots.Series(system.name, speeds, colour))
    plots.dots(axes, names, series)
    ours = [_decode_ms(chosen, OURS, name) for name in names]
    gain = mean(base) / mean(ours)
    axes.set_title(f"Ours decodes {gain:.2f}x as fast as a fixed placement of experts")
    axes.set_xlabel("decode speed over a placement like kTransformers' (simulated)")


def _decode_ms(rows: Sequence[Row], system: System, trace: str) -> float:
    """Decode time of one system on one trace, geometric mean over the cache sizes."""
    return mean(column(where(rows, system=system.name, trace=trace), "decode ms"))


if __name__ == "__main__":
    main()
