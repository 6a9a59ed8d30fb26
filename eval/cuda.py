"""On one NVIDIA GPU: roofline, then four systems at three cache sizes, prefill and decode of shape-accurate models.

`python -m eval.throughput --device cuda` comes here. The models are MoE layers only, driven by given routing, recorded
or generated as the column says; the CPU is limited to ten threads. `whole_model` in the last line is what
`eval.cuda_model` says of whole models, with attention, norms and head, at half the experts.
Without a CUDA device it is a dry run: the same code on the emulated accelerator with small matrices, times from the
simulated clock and the published profile of the paper's machine, and `emulated` true.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from eval import cuda_bandwidth, report
from eval.cuda_bandwidth import Bandwidths
from eval.cuda_bench import Bench, limit_cpu
from eval.shapes import MODELS, Model
from eval.systems import KTRANSFORMERS, OURS, PUBLISHED, System
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.experts.slot_accelerator import cuda_refusal
from hybrimoe_plugin.policy.counters import Counters

log = logging.getLogger(__name__)

LOAD_EVERY_MISS = System(
    "load every miss, LRU", {"scheduler": "accelerator_only", "cache": "lru", "budget": "layer", "prefetch": "off"}
)
SYSTEMS = (KTRANSFORMERS, LOAD_EVERY_MISS, PUBLISHED, OURS)
RATIOS = (0.25, 0.5, 0.75)
PHASES = ("prefill", "decode")
REPEATS = 20
"""Prompts, and the fewest decode steps that count."""
CELL_SECONDS = 8.0
"""Decode of one cell stops after this."""
EVERY = "demo"
"""What `--model` of `eval.throughput` says when it was not given."""


class Timing(NamedTuple):
    """One cell's phase."""

    us: list[float]
    counts: Counters


def measure(bench: Bench, system: System, ratio: float) -> dict[str, Timing]:
    """Both phases of one system at one cache size; warm-up is one prompt and four tokens."""
    engine = bench.engine(system, ratio)
    prompts, decode = bench.routing.prompts, bench.routing.decode
    for calls in (prompts[-1], *decode[:4]):
        bench.run(engine, calls)
    found = {}
    for phase in PHASES:
        before, us, started = engine.controller.counters.snapshot(), [], time.perf_counter()
        repeats = (3 if bench.quick else REPEATS) if phase == "prefill" else len(decode)
        for turn in range(repeats):
            us.append(bench.run(engine, prompts[turn % len(prompts)] if phase == "prefill" else decode[turn]))
            if len(us) >= REPEATS and time.perf_counter() - started > CELL_SECONDS:
                break
        found[phase] = Timing(us, engine.controller.counters.since(before))
    return found


def roofline_us(bench: Bench, bandwidths: Bandwidths, counts: Counters, passes: int) -> float:
    """Least time of one pass: every expert's bytes once, misses over CPU and link together, all of it overlapped."""
    needed = counts.activations * bench.expert_bytes / passes
    missing = needed * (1.0 - counts.hit_rate)
    shared = missing / (bandwidths.cpu + bandwidths.link)
    return max(shared, needed / (bandwidths.cpu + bandwidths.accelerator))


def rows_of(bench: Bench, bandwidths: Bandwidths) -> list[dict[str, Any]]:
    """One row for each cache size, system and phase."""
    rows = []
    for ratio in RATIOS:
        for system in SYSTEMS:
            for phase, timing in measure(bench, system, ratio).items():
                low, middle, high = statistics.quantiles(timing.us, n=10)[1::3] if len(timing.us) > 1 else timing.us * 3
                rows.append(
                    {
                        "model": bench.model.name,
                        "layers": len(bench.layers),
                        "routing": f"{bench.routing.header.source} ({bench.model.note})",
                        "cache": ratio,
                        "method": system.name,
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
                )
    return rows


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
    shares = [row["roofline_ms"] / row["p50_ms"] for cell, row in ours.items() if cell[2] == "decode"]
    result["roofline_share"] = statistics.geometric_mean(shares)
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole question; `args` has `out`, `quick` and `model`. Gives what the JSON line says.

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
    rows: list[dict[str, Any]] = []
    roofs: list[dict[str, Any]] = []
    for model in models:
        bench = Bench(model, dry, args.quick)
        try:
            bandwidths = cuda_bandwidth.bandwidths(bench.costs, bench.expert_bytes, None if dry else bench.device)
            shares = {} if dry else cuda_bandwidth.shares(bench.accelerator, bench.layers, bandwidths)
            roofs.append({"model": model.name, **bandwidths.row(), **shares, "note": model.note, "emulated": dry})
            report.show(f"{model.name}: bandwidths{' (emulated)' if dry else ''}", roofs[-1:])
            rows += rows_of(bench, bandwidths)
        finally:
            bench.close()
    report.show(f"Times{', emulated' if dry else ', measured'}", [_short(row) for row in rows])
    report.save_csv(args.out / "cuda.csv", [{**row, "driver": cuda_bandwidth.driver()} for row in rows])
    report.save_csv(args.out / "cuda_bandwidth.csv", [{**row, "driver": cuda_bandwidth.driver()} for row in roofs])
    least = {
        name: None if dry else min(row[name] for row in roofs) for name in ("link_share", "kernel_bandwidth_share")
    }
    result = {**summary(rows), **least, "emulated": dry, "whole_model": whole_models(models, dry, args)}
    report.finish(result)
    return result


def named(name: str) -> list[Model]:
    """The models of one name in `eval.synthetic`, or all. Raises: ConfigError: there is none."""
    found = [model for model in MODELS if name in (EVERY, model.shape)]
    if not found:
        raise ConfigError(f"model: expected one of {', '.join({model.shape for model in MODELS})}, found {name!r}")
    return found


def whole_models(models: Sequence[Model], dry: bool, args: argparse.Namespace) -> dict[str, Any] | None:
    """What `eval.cuda_model` says of these models at half the experts; None if it fails: the layers' times stand."""
    from eval import cuda_model

    try:
        return cuda_model.measure_all(models, (0.5,), dry, args)
    except Exception as error:
        log.error("whole models could not be measured: %s", error, exc_info=True)
        return None


def _short(row: dict[str, Any]) -> dict[str, Any]:
    names = ("model", "cache", "method", "phase", "p20_ms", "p50_ms", "p80_ms", "roofline_ms", "hit_rate")
    return {name: row[name] for name in names}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """`python -m eval.cuda`, the same as `python -m eval.throughput --device cuda`."""
    logging.basicConfig(level=logging.WARNING)
    parser = report.parser(__doc__ or "")
    parser.add_argument("--model", default=EVERY, help="one model's shape instead of all")
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
