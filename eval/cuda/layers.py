"""Times of the MoE layers of one model: every system at every cache size, in both phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from eval.gpu_bench import bandwidth
from eval.gpu_bench.bandwidth import Bandwidths
from eval.gpu_bench.baselines import PHASES, RATIOS, SYSTEMS
from eval.gpu_bench.bench import Bench
from eval.models.shapes import Model
from eval.policies.systems import System
from eval.reporting import report
from eval.reporting.finished import Finished, Row
from eval.reporting.progress import Progress
from eval.reporting.quantiles import times_ms
from hybrimoe_plugin.policy.counters import Counters

REPEATS = 20
"""Number of prompts, and the fewest decode steps that count."""
QUICK_PROMPTS = 3
WARM_UP = 8
"""Decode steps that do not count: after them no system moves more experts per step than later.

They differ from the steps that count: a cache that has already seen those, LRU in particular, would
hold the experts of the first ones.
"""
CELL_SECONDS = 8.0
"""Decode of one cell stops after this time."""
LAYERS, BANDWIDTHS = "layers", "bandwidths"
"""Questions that a row of the journal may belong to."""


class Timing(NamedTuple):
    """One phase of one cell."""

    us: list[float]
    counts: Counters


def cells() -> list[tuple[float, System]]:
    """Cache size and system of each cell of a model."""
    return [(ratio, system) for ratio in RATIOS for system in SYSTEMS]


def cell_key(model: Model, ratio: float, system: System) -> Row:
    """Columns that identify a cell in the journal."""
    return {"question": LAYERS, "model": model.name, "cache": ratio, "method": system.name}


def measure(bench: Bench, system: System, ratio: float) -> dict[str, Timing]:
    """Measure both phases of one system at one cache size.

    Every system is warmed up with the same passes: one prompt, then `WARM_UP` decode steps, or half
    of the steps where there are fewer than twice as many.
    """
    engine = bench.engine(system, ratio)
    counters = engine.controller.counters
    prompts, decode = bench.routing.prompts, bench.routing.decode
    warm_up = min(WARM_UP, len(decode) // 2)
    count = QUICK_PROMPTS if bench.quick else REPEATS
    counted_prompts = [prompts[turn % len(prompts)] for turn in range(count)]
    passes = {
        "prefill": (prompts[-1:], counted_prompts),
        "decode": (decode[:warm_up], decode[warm_up:]),
    }
    found = {}
    for phase, (first, counted) in passes.items():
        for calls in first:
            bench.run(engine, calls)
        before = counters.snapshot()
        us: list[float] = []
        started = time.perf_counter()
        for calls in counted:
            us.append(bench.run(engine, calls))
            spent = time.perf_counter() - started
            if len(us) >= REPEATS and spent > CELL_SECONDS:
                break
        found[phase] = Timing(us, counters.since(before))
    return found


def roofline_us(bench: Bench, bandwidths: Bandwidths, counts: Counters, passes: int) -> float:
    """Lower bound on the time of one pass.

    Each expert's bytes are read once, misses are shared by CPU and link, and everything overlaps.
    """
    needed = counts.activations * bench.expert_bytes / passes
    missing = needed * (1.0 - counts.hit_rate)
    misses_us = missing / (bandwidths.cpu + bandwidths.link)
    all_us = needed / (bandwidths.cpu + bandwidths.accelerator)
    return max(misses_us, all_us)


def rows_of(bench: Bench, bandwidths: Bandwidths, system: System, ratio: float) -> Iterator[Row]:
    """One row for each phase of a cell."""
    prompt_tokens = len(bench.routing.prompts[0][0].ids)
    for phase, timing in measure(bench, system, ratio).items():
        passes = len(timing.us)
        bound_us = roofline_us(bench, bandwidths, timing.counts, passes)
        yield {
            **cell_key(bench.model, ratio, system),
            "layers": len(bench.layers),
            "routing": f"{bench.routing.header.source} ({bench.model.note})",
            "phase": phase,
            "tokens": prompt_tokens if phase == "prefill" else 1,
            **times_ms(timing.us),
            "roofline_ms": bound_us / 1e3,
            "hit_rate": timing.counts.hit_rate,
            "link_mb_per_pass": timing.counts.link_bytes / passes / 1e6,
            "emulated": bench.dry,
        }


def model_rows(
    model: Model, dry: bool, quick: bool, found: Finished, progress: Progress
) -> tuple[Row, list[Row]]:
    """(bandwidths, rows of all cells) of one model.

    Rows are taken from the journal, or measured and saved one by one.
    """
    kept = _kept(model, found)
    if kept is not None:
        return kept
    bench = Bench(model, dry, quick)
    label = " (emulated)" if dry else ""
    try:
        roof = _roof(bench, found)
        bandwidths = _bandwidths(roof)
        report.show(f"{model.name}: bandwidths{label}", [found.bare(roof)])
        rows: list[Row] = []
        for ratio, system in cells():
            # The number of layers that fit may have changed since the journal was written.
            key = cell_key(model, ratio, system)
            cell = found.phases(*PHASES, **key, layers=len(bench.layers))
            if cell is None:
                cell = [found.add(row) for row in rows_of(bench, bandwidths, system, ratio)]
                progress.done(LAYERS)
            rows += cell
        return roof, rows
    finally:
        bench.close()


def _bandwidths(roof: Row) -> Bandwidths:
    gbps = [roof[f"{name}_gbps"] for name in Bandwidths._fields]
    return Bandwidths(*(1e3 * value for value in gbps))


def _kept(model: Model, found: Finished) -> tuple[Row, list[Row]] | None:
    """The model's rows, if an earlier run measured all of them with one number of layers."""
    roofs = found.find(question=BANDWIDTHS, model=model.name)
    if not roofs:
        return None
    rows: list[Row] = []
    for ratio, system in cells():
        cell = found.phases(*PHASES, **cell_key(model, ratio, system))
        if cell is None:
            return None
        rows += cell
    if len({row["layers"] for row in rows}) != 1:
        return None
    return roofs[-1], rows


def _roof(bench: Bench, found: Finished) -> Row:
    """The model's bandwidths; all its rooflines use one measurement."""
    count = len(bench.layers)
    kept = found.find(question=BANDWIDTHS, model=bench.model.name, layers=count)
    if kept:
        return kept[-1]
    device = None if bench.dry else bench.device
    measured = bandwidth.bandwidths(bench.costs, bench.expert_bytes, device)
    shares: dict[str, float] = {}
    if not bench.dry:
        shares = bandwidth.shares(bench.accelerator, bench.layers, measured)
    name = {"question": BANDWIDTHS, "model": bench.model.name, "layers": count}
    note = {"note": bench.model.note, "emulated": bench.dry}
    return found.add({**name, **measured.row(), **shares, **note})
