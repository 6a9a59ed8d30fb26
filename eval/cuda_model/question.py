"""Whole models on one NVIDIA GPU: how long do a prompt and a decode step take?

Ours is measured with and without CUDA graphs. `python -m eval.throughput --device cuda` measures
MoE layers alone. Here attention with a growing KV cache, norms, routers, dense parts and the head
run too, as a user's rules inject them. Weights are random in the models' shapes and types. Each
router computes, and its choice is then replaced by given routing on the device, so that CUDA graphs
contain it. Predictions for a layer are the same from every earlier layer. Without a CUDA device it
is a dry run: small matrices, the emulated accelerator, and its simulated time of the MoE layers
alone.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.cuda_model.model_file import layers_that_fit, write
from eval.cuda_model.subject import Subject, Timing, measure
from eval.gpu_bench.baselines import (
    JOURNAL,
    NO_GRAPHS,
    NOT_JUDGED,
    PHASES,
    PLAIN,
    RATIOS,
    SYSTEMS,
)
from eval.gpu_bench.bench import RECALL, limit_cpu
from eval.models.routing import Routing, routing
from eval.models.shapes import MODELS, Model
from eval.policies.systems import KTRANSFORMERS, OURS, System
from eval.reporting import report
from eval.reporting.finished import Finished, Row, add_fresh
from eval.reporting.progress import Planned, Progress
from eval.reporting.quantiles import times_ms
from hybrimoe_plugin.device.machine import cuda_refusal

log = logging.getLogger(__name__)

WHOLE = "whole models"
"""The question that a row of the journal belongs to."""
CELL_S = {True: 8.0, False: 15.0}
"""Estimated time of a cell on a GPU, quick and full: loading, capturing, prompts, steps."""
DRY_CELL_S = {True: 0.6, False: 4.0}
"""Measured time of a dry run's cell on 2 cores."""
SHOWN = (
    "model",
    "cache",
    "method",
    "phase",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "hit_rate",
    "layers_captured",
)
"""Columns of the printed table."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives the contents of the JSON line."""
    logging.basicConfig(level=logging.WARNING)
    parser = report.parser(__doc__ or "", "python -m eval.cuda_model")
    add_fresh(parser)
    args = parser.parse_args(arguments)
    reason = cuda_refusal()
    dry = reason is not None
    if dry:
        log.warning("dry run on the emulated accelerator, no number is a measurement: %s", reason)
        torch.set_num_threads(1)
    else:
        limit_cpu()
    ratios = (0.5,) if args.quick else RATIOS
    found = Finished(args.out / JOURNAL, args.quick, args.fresh)
    left, taken = planned(MODELS, ratios, dry, args.quick, found)
    with Progress({WHOLE: left}, taken) as progress:
        result = measure_all(MODELS, ratios, dry, args, found, progress)
    result |= {"judged": not args.quick, "emulated": dry}
    if args.quick:
        print(NOT_JUDGED)
    report.finish(result)
    return result


def measure_all(
    models: Sequence[Model],
    ratios: Sequence[float],
    dry: bool,
    args: Namespace,
    found: Finished,
    progress: Progress,
) -> dict[str, Any]:
    """Measure every model, show the rows and save them in `args.out`.

    Returns:
        the contents of the JSON line; all None in a quick run, which gives no verdict.
    """
    rows: list[Row] = []
    for model in models:
        rows += model_rows(model, ratios, dry, args.quick, found, progress)
    title = "Whole models: times of the MoE layers, emulated" if dry else "Whole models, measured"
    report.show(title, [{name: row[name] for name in SHOWN} for row in rows])
    report.save_csv(args.out / "cuda_model.csv", rows)
    result: dict[str, Any] = summary(rows)
    if dry:  # the emulated accelerator knows of MoE layers alone
        result |= {"decode_graphs_speedup": None, "decode_dense_operators_speedup": None}
    return dict.fromkeys(result) if args.quick else result


def cells(ratios: Sequence[float]) -> list[tuple[float, System]]:
    """Cache size and system of each cell of a model."""
    return [(ratio, system) for ratio in ratios for system in (*SYSTEMS, NO_GRAPHS, PLAIN)]


def planned(
    models: Sequence[Model], ratios: Sequence[float], dry: bool, quick: bool, found: Finished
) -> tuple[Planned, int]:
    """(cells still to be measured, number of cells that an earlier run measured)."""
    keys = [_key(model, ratio, system) for model in models for ratio, system in cells(ratios)]
    left = sum(found.phases(*PHASES, **key) is None for key in keys)
    seconds = DRY_CELL_S[quick] if dry else CELL_S[quick]
    return Planned(left, seconds), len(keys) - left


def model_rows(
    model: Model,
    ratios: Sequence[float],
    dry: bool,
    quick: bool,
    found: Finished,
    progress: Progress,
) -> Iterator[Row]:
    """One row for each cell and phase of a model.

    Rows are taken from the journal, or measured and saved one by one.
    """
    prompt_tokens, steps = (32, 16) if quick else (128, 64)
    given = routing(model, prompt_tokens, steps, look_ahead=3, recall=RECALL)
    layers = layers_that_fit(model, given, dry)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for ratio, system in cells(ratios):
            # The number of layers that fit may have changed since the journal was written.
            key = {**_key(model, ratio, system), "moe_layers": layers}
            kept = found.phases(*PHASES, **key)
            if kept is None:
                if not path.exists():
                    write(model, given, layers, path, dry)
                timing = _measured(path, system, ratio, given, dry)
                kept = [found.add({**key, **row}) for row in _rows(model, given, timing, dry)]
                progress.done(WHOLE)
            yield from kept


def _measured(path: Path, system: System, ratio: float, given: Routing, dry: bool) -> Timing:
    subject = Subject(path, system, ratio, given, dry)
    try:
        return measure(subject, given)
    finally:
        subject.close()


def _key(model: Model, ratio: float, system: System) -> Row:
    return {"question": WHOLE, "model": model.name, "cache": ratio, "method": system.name}


def _rows(model: Model, given: Routing, timing: Timing, dry: bool) -> Iterator[Row]:
    """One row for each phase."""
    prompt_tokens = len(given.prompts[0][0].ids)
    for phase, us in zip(PHASES, (timing.prefill_us, timing.decode_us), strict=True):
        yield {
            "routing": f"{given.header.source} ({model.note})",
            "phase": phase,
            "tokens": prompt_tokens if phase == "prefill" else 1,
            **times_ms(us),
            "hit_rate": timing.hit_rate,
            "layers_captured": timing.captured,
            "emulated": dry,
        }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Geometric means over models and cache sizes, of ratios of medians."""
    names = ("model", "cache", "phase", "method")
    times = {tuple(row[name] for name in names): row["p50_ms"] for row in rows}

    def gain(other: System, phase: str) -> float:
        ratios = []
        for (*cell, kind, method), time in times.items():
            if kind == phase and method == other.name:
                ratios.append(time / times[(*cell, phase, OURS.name)])
        return statistics.geometric_mean(ratios)

    return {
        "decode_speedup_geomean": gain(KTRANSFORMERS, "decode"),
        "prefill_speedup_geomean": gain(KTRANSFORMERS, "prefill"),
        "decode_graphs_speedup": gain(NO_GRAPHS, "decode"),
        "decode_dense_operators_speedup": gain(PLAIN, "decode"),
    }
