"""On one NVIDIA GPU: roofline, then four systems at three cache sizes, prefill and decode of
shape-accurate models.

`python -m eval.throughput --device cuda` comes here. The models are MoE layers only, driven by
given routing, recorded or generated as the column says; the CPU is limited to ten threads.
`whole_model` in the last line is what `eval.cuda_model` says of whole models, with attention, norms
and head, at half the experts. Every finished row is in `cuda.jsonl` at once; the same command goes
on after the last one. A quick run does not judge. Without a CUDA device it is a dry run: the same
code on the emulated accelerator with small matrices, times from the simulated clock and the
published profile of the paper's machine, and `emulated` true.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from eval import cuda_bandwidth, report
from eval.cuda_bandwidth import Bandwidths
from eval.cuda_bench import Bench, limit_cpu
from eval.finished import Finished, Row, add_fresh
from eval.progress import Planned, Progress
from eval.shapes import MODELS, Model
from eval.systems import KTRANSFORMERS, OURS, PUBLISHED, System
from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.counters import Counters

log = logging.getLogger(__name__)

LOAD_EVERY_MISS = System(
    "load every miss, LRU",
    {"scheduler": "accelerator_only", "cache": "lru", "budget": "layer", "prefetch": "off"},
)
SYSTEMS = (KTRANSFORMERS, LOAD_EVERY_MISS, PUBLISHED, OURS)
RATIOS = (0.25, 0.5, 0.75)
PHASES = ("prefill", "decode")
REPEATS = 20
"""Prompts, and the fewest decode steps that count."""
WARM_UP = 8
"""Decode steps that do not count: after them no system moves more experts a step than later. They
are steps of their own, because a cache that has seen the steps that count, as LRU had, finds the
experts of the first ones.
"""
CELL_SECONDS = 8.0
"""Decode of one cell stops after this."""
JOURNAL = "cuda.jsonl"
LAYERS, BANDWIDTHS = "layers", "bandwidths"
"""Questions that a row of the journal may belong to."""
NOT_JUDGED = (
    "a quick run does not judge: a few steps of a few layers put a median on either side of one "
    "expert's time; "
    "its comparisons are null, its times are in the table"
)
VERDICTS = ("decode_speedup_geomean", "prefill_speedup_geomean", "worst_cell_vs_any_baseline")
DRY_CELL_S = {True: 0.4, False: 9.0}
"""What a cell of a dry run took on 2 cores, quick and full."""
WHOLE_RATIOS = (0.5,)
"""Cache sizes at which whole models are measured after the layers."""
EVERY = "demo"
"""What `--model` of `eval.throughput` says when it was not given."""


class Timing(NamedTuple):
    """One cell's phase."""

    us: list[float]
    counts: Counters


def measure(bench: Bench, system: System, ratio: float) -> dict[str, Timing]:
    """Both phases of one system at one cache size; before each, every system has the same passes to
    warm up.

    That is one prompt, and `WARM_UP` decode steps, or half of the steps where there are fewer than
    twice as many.
    """
    engine = bench.engine(system, ratio)
    counters = engine.controller.counters
    prompts, decode = bench.routing.prompts, bench.routing.decode
    warm_up = min(WARM_UP, len(decode) // 2)
    prefill_passes = [prompts[turn % len(prompts)] for turn in range(3 if bench.quick else REPEATS)]
    passes = {
        "prefill": (prompts[-1:], prefill_passes),
        "decode": (decode[:warm_up], decode[warm_up:]),
    }
    found = {}
    for phase, (first, counted) in passes.items():
        for calls in first:
            bench.run(engine, calls)
        before, us, started = counters.snapshot(), [], time.perf_counter()
        for calls in counted:
            us.append(bench.run(engine, calls))
            if len(us) >= REPEATS and time.perf_counter() - started > CELL_SECONDS:
                break
        found[phase] = Timing(us, counters.since(before))
    return found


def roofline_us(bench: Bench, bandwidths: Bandwidths, counts: Counters, passes: int) -> float:
    """Least time of one pass: every expert's bytes once, misses over CPU and link together, all of
    it overlapped.
    """
    needed = counts.activations * bench.expert_bytes / passes
    missing = needed * (1.0 - counts.hit_rate)
    shared = missing / (bandwidths.cpu + bandwidths.link)
    return max(shared, needed / (bandwidths.cpu + bandwidths.accelerator))


def cells() -> list[tuple[float, System]]:
    """Cache size and system of each cell of a model."""
    return [(ratio, system) for ratio in RATIOS for system in SYSTEMS]


def rows_of(bench: Bench, bandwidths: Bandwidths, system: System, ratio: float) -> Iterator[Row]:
    """One row for each phase of a cell."""
    for phase, timing in measure(bench, system, ratio).items():
        low, middle, high = (
            statistics.quantiles(timing.us, n=10)[1::3] if len(timing.us) > 1 else timing.us * 3
        )
        yield {
            **_key(bench.model, ratio, system),
            "layers": len(bench.layers),
            "routing": f"{bench.routing.header.source} ({bench.model.note})",
            "phase": phase,
            "tokens": len(bench.routing.prompts[0][0].ids) if phase == "prefill" else 1,
            "p20_ms": low / 1e3,
            "p50_ms": statistics.median(timing.us) / 1e3,
            "p80_ms": high / 1e3,
            "repetitions": len(timing.us),
            "roofline_ms": roofline_us(bench, bandwidths, timing.counts, len(timing.us)) / 1e3,
            "hit_rate": timing.counts.hit_rate,
            "link_mb_per_pass": timing.counts.link_bytes / len(timing.us) / 1e6,
            "emulated": bench.dry,
        }


def model_rows(
    model: Model, dry: bool, quick: bool, found: Finished, progress: Progress
) -> tuple[Row, list[Row]]:
    """(bandwidths, all cells' rows) of one model, taken from the journal or measured and saved one
    by one.
    """
    kept = _kept(model, found)
    if kept is not None:
        return kept
    bench = Bench(model, dry, quick)
    try:
        roof = _roof(bench, found)
        bandwidths, rows = _bandwidths(roof), []
        report.show(f"{model.name}: bandwidths{' (emulated)' if dry else ''}", [found.bare(roof)])
        for ratio, system in cells():
            # Layers are as many as fit, which may have changed since.
            cell = found.phases(*PHASES, **_key(model, ratio, system), layers=len(bench.layers))
            if cell is None:
                cell = [found.add(row) for row in rows_of(bench, bandwidths, system, ratio)]
                progress.done(LAYERS)
            rows += cell
        return roof, rows
    finally:
        bench.close()


def _bandwidths(roof: Row) -> Bandwidths:
    return Bandwidths(*(1e3 * roof[f"{name}_gbps"] for name in Bandwidths._fields))


def _key(model: Model, ratio: float, system: System) -> Row:
    return {"question": LAYERS, "model": model.name, "cache": ratio, "method": system.name}


def _kept(model: Model, found: Finished) -> tuple[Row, list[Row]] | None:
    """Everything about a model, if an earlier run measured it all, with one number of layers."""
    roofs = found.find(question=BANDWIDTHS, model=model.name)
    kept = [found.phases(*PHASES, **_key(model, ratio, system)) for ratio, system in cells()]
    rows = [row for cell in kept if cell is not None for row in cell]
    whole = roofs and None not in kept and len({row["layers"] for row in rows}) == 1
    return (roofs[-1], rows) if whole else None


def _roof(bench: Bench, found: Finished) -> Row:
    """The model's bandwidths. All its rooflines come from one measurement."""
    kept = found.find(question=BANDWIDTHS, model=bench.model.name, layers=len(bench.layers))
    if kept:
        return kept[-1]
    device = None if bench.dry else bench.device
    bandwidths = cuda_bandwidth.bandwidths(bench.costs, bench.expert_bytes, device)
    shares = {} if bench.dry else cuda_bandwidth.shares(bench.accelerator, bench.layers, bandwidths)
    name = {"question": BANDWIDTHS, "model": bench.model.name, "layers": len(bench.layers)}
    return found.add(
        {**name, **bandwidths.row(), **shares, "note": bench.model.note, "emulated": bench.dry}
    )


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Speed-ups and roofline share, from the rows' medians."""
    times = {(row["model"], row["cache"], row["phase"], row["method"]): row for row in rows}
    cells = {(row["model"], row["cache"], row["phase"]) for row in rows}
    ours = {cell: times[(*cell, OURS.name)] for cell in cells}

    def gain(cell: tuple[Any, ...], system: System) -> float:
        return float(times[(*cell, system.name)]["p50_ms"] / ours[cell]["p50_ms"])

    result = {
        f"{phase}_speedup_geomean": statistics.geometric_mean(
            gain(cell, KTRANSFORMERS) for cell in cells if cell[2] == phase
        )
        for phase in ("decode", "prefill")
    }
    result["worst_cell_vs_any_baseline"] = min(
        gain(cell, system) for cell in cells for system in SYSTEMS if system is not OURS
    )
    shares = [
        row["roofline_ms"] / row["p50_ms"] for cell, row in ours.items() if cell[2] == "decode"
    ]
    result["roofline_share"] = statistics.geometric_mean(shares)
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole question; `args` has `out`, `quick`, `fresh` and `model`. Gives what the JSON line
    says.

    Raises:
        ConfigError: no such model.
    """
    models = named(args.model)
    reason = cuda_refusal()
    dry = reason is not None
    if dry:
        log.warning("dry run on the emulated accelerator, no number is a measurement: %s", reason)
        torch.set_num_threads(1)  # tiny operations: more threads only wait for one another
    else:
        limit_cpu()
    found = Finished(args.out / JOURNAL, args.quick, args.fresh)
    roofs, rows = [], []
    with _progress(models, dry, args.quick, found) as progress:
        for model in models:
            roof, some = model_rows(model, dry, args.quick, found, progress)
            roofs.append(roof)
            rows += some
        report.show(f"Times{', emulated' if dry else ', measured'}", [_short(row) for row in rows])
        report.save_csv(args.out / "cuda.csv", rows)
        report.save_csv(args.out / "cuda_bandwidth.csv", roofs)
        whole = whole_models(models, dry, args, found, progress)
    least = {
        name: None if dry else min(row[name] for row in roofs)
        for name in ("link_share", "kernel_bandwidth_share")
    }
    result = {
        **summary(rows),
        **least,
        "judged": not args.quick,
        "emulated": dry,
        "whole_model": whole,
    }
    if args.quick:
        result |= dict.fromkeys(VERDICTS)
        print(NOT_JUDGED)
    report.finish(result)
    return result


def _progress(models: Sequence[Model], dry: bool, quick: bool, found: Finished) -> Progress:
    """Says what is left to do, layers and whole models together, and how long that may take."""
    from eval import cuda_model

    keys = [_key(model, ratio, system) for model in models for ratio, system in cells()]
    left = sum(found.phases(*PHASES, **key) is None for key in keys)
    planned, taken = cuda_model.planned(models, WHOLE_RATIOS, dry, quick, found)
    # Prompts of a cell take about as long as decode, which stops after CELL_SECONDS.
    guess = DRY_CELL_S[quick] if dry else CELL_SECONDS * (0.5 if quick else 2.0)
    return Progress(
        {LAYERS: Planned(left, guess), cuda_model.WHOLE: planned}, taken + len(keys) - left
    )


def named(name: str) -> list[Model]:
    """The models of one name in `eval.synthetic`, or all. Raises: ConfigError: there is none."""
    found = [model for model in MODELS if name in (EVERY, model.shape)]
    if not found:
        raise ConfigError(
            f"model: expected one of {', '.join({model.shape for model in MODELS})}, found {name!r}"
        )
    return found


def whole_models(
    models: Sequence[Model],
    dry: bool,
    args: argparse.Namespace,
    found: Finished,
    progress: Progress,
) -> dict[str, Any] | None:
    """What `eval.cuda_model` says of these models at half the experts; None if it fails: the
    layers' times stand.
    """
    from eval import cuda_model

    try:
        return cuda_model.measure_all(models, WHOLE_RATIOS, dry, args, found, progress)
    except Exception as error:
        log.error("whole models could not be measured: %s", error, exc_info=True)
        return None


def _short(row: dict[str, Any]) -> dict[str, Any]:
    names = (
        "model",
        "cache",
        "method",
        "phase",
        "p20_ms",
        "p50_ms",
        "p80_ms",
        "roofline_ms",
        "hit_rate",
    )
    return {name: row[name] for name in names}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """`python -m eval.cuda`, the same as `python -m eval.throughput --device cuda`."""
    logging.basicConfig(level=logging.WARNING)
    parser = report.parser(__doc__ or "")
    parser.add_argument("--model", default=EVERY, help="one model's shape instead of all")
    add_fresh(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
