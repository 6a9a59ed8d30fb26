"""On one NVIDIA GPU: how fast are four systems at three cache sizes, in prefill and decode?

Bandwidths and the roofline come first. `python -m eval.throughput --device cuda` runs this too. The
models consist of MoE layers alone, driven by given routing, recorded or generated as the column
says; the CPU is limited to ten threads. `whole_model` in the last line holds the result of
`eval.cuda_model` at half of the experts: whole models, with attention, norms and head. Every
finished row is saved in `cuda.jsonl` at once, and the same command continues after the last one. A
quick run gives no verdict. Without a CUDA device it is a dry run: the same code on the emulated
accelerator with small matrices, times from the simulated clock and the published profile of the
paper's machine, and `emulated` true.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

import torch

from eval.cuda.layers import CELL_SECONDS, LAYERS, cell_key, cells, model_rows
from eval.cuda.summary import VERDICTS, summary
from eval.cuda_model import question as cuda_model
from eval.gpu_bench.baselines import JOURNAL, NOT_JUDGED, PHASES
from eval.gpu_bench.bench import limit_cpu
from eval.models.shapes import MODELS, Model
from eval.reporting import report
from eval.reporting.finished import Finished, Row, add_fresh
from eval.reporting.progress import Planned, Progress
from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.errors import ConfigError

log = logging.getLogger(__name__)

DRY_CELL_S = {True: 0.4, False: 9.0}
"""Measured time of a dry run's cell on 2 cores, quick and full."""
WHOLE_RATIOS = (0.5,)
"""Cache sizes at which whole models are measured after the layers."""
EVERY = "demo"
"""Default of `--model` in `eval.throughput`; stands for all models here."""
SHOWN = (
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
"""Columns of the printed table."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """`python -m eval.cuda`, the same as `python -m eval.throughput --device cuda`."""
    logging.basicConfig(level=logging.WARNING)
    parser = report.parser(__doc__ or "", "python -m eval.cuda")
    parser.add_argument("--model", default=EVERY, help="one model's shape instead of all")
    add_fresh(parser)
    return run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole question; gives the contents of the JSON line.

    Args:
        args: has `out`, `quick`, `fresh` and `model`.

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
    roofs: list[Row] = []
    rows: list[Row] = []
    with _progress(models, dry, args.quick, found) as progress:
        for model in models:
            roof, some = model_rows(model, dry, args.quick, found, progress)
            roofs.append(roof)
            rows += some
        label = "emulated" if dry else "measured"
        report.show(f"Times, {label}", [{name: row[name] for name in SHOWN} for row in rows])
        report.save_csv(args.out / "cuda.csv", rows)
        report.save_csv(args.out / "cuda_bandwidth.csv", roofs)
        whole = whole_models(models, dry, args, found, progress)
    result: dict[str, Any] = summary(rows)
    for name in ("link_share", "kernel_bandwidth_share"):
        result[name] = None if dry else min(row[name] for row in roofs)
    result |= {"judged": not args.quick, "emulated": dry, "whole_model": whole}
    if args.quick:
        result |= dict.fromkeys(VERDICTS)
        print(NOT_JUDGED)
    report.finish(result)
    return result


def named(name: str) -> list[Model]:
    """The models of one shape, or all.

    Args:
        name: a key of `eval.models.synthetic.SHAPES`, or `EVERY`.

    Raises:
        ConfigError: there is no such model.
    """
    found = [model for model in MODELS if name in (EVERY, model.shape)]
    if not found:
        shapes = ", ".join({model.shape for model in MODELS})
        raise ConfigError(f"model: expected one of {shapes}, found {name!r}")
    return found


def whole_models(
    models: Sequence[Model],
    dry: bool,
    args: argparse.Namespace,
    found: Finished,
    progress: Progress,
) -> dict[str, Any] | None:
    """Result of `eval.cuda_model` for these models at half of the experts.

    Returns:
        None if it fails; the times of the layers remain valid.
    """
    try:
        return cuda_model.measure_all(models, WHOLE_RATIOS, dry, args, found, progress)
    except Exception as error:
        log.error("whole models could not be measured: %s", error, exc_info=True)
        return None


def _progress(models: Sequence[Model], dry: bool, quick: bool, found: Finished) -> Progress:
    """What is left to do, layers and whole models together, and how long that may take."""
    keys = [cell_key(model, ratio, system) for model in models for ratio, system in cells()]
    left = sum(found.phases(*PHASES, **key) is None for key in keys)
    whole, taken = cuda_model.planned(models, WHOLE_RATIOS, dry, quick, found)
    # Prompts of a cell take about as long as decode, which stops after CELL_SECONDS.
    guess = CELL_SECONDS * (0.5 if quick else 2.0)
    if dry:
        guess = DRY_CELL_S[quick]
    planned = {LAYERS: Planned(left, guess), cuda_model.WHOLE: whole}
    return Progress(planned, taken + len(keys) - left)
