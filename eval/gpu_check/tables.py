"""The check's tables: one for each stage with results, and one of all stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.gpu_check.plan import Stage
from eval.gpu_check.results import END, Line, headline, rows
from eval.reporting import report

DETAIL_WIDTH = 60
EVERYWHERE = {
    "stage",
    "at_s",
    "run",
    "emulated",
    "cpu",
    "cores",
    "gpu",
    "os",
    "python",
    "torch",
    "triton",
    "transformers",
    "kt-kernel",
    "ktransformers-hybrimoe",
    "driver",
    "commit",
    "date",
}
"""Columns that every line of the results has; tables leave them out."""


def show(lines: Sequence[Line], stages: Sequence[Stage], dry: bool) -> None:
    """Print the results of every stage, then how all of them ended."""
    title = "emulated, no number is a measurement" if dry else "measured"
    for stage in stages:
        found = rows(lines, stage.name)
        if found:
            report.show(f"{stage.name}: {stage.what} ({title})", columns(found))
    ends = {line["stage"]: line for line in lines if line["case"] == END}
    table = [_ending(lines, stage, ends.get(stage.name, {})) for stage in stages]
    report.show(f"All stages ({title})", table)


def columns(found: Sequence[Line]) -> list[dict[str, Any]]:
    """A stage's rows with the same columns in each, without what every line has."""
    names: dict[str, None] = {}
    for line in found:
        names |= dict.fromkeys(name for name in line if name not in EVERYWHERE)
    return [{name: line.get(name, "") for name in names} for line in found]


def _ending(lines: Sequence[Line], stage: Stage, end: Line) -> dict[str, Any]:
    unfinished = "cut off" if rows(lines, stage.name) else "not run"
    return {
        "stage": stage.name,
        "status": end.get("status", unfinished),
        "seconds": end.get("seconds", ""),
        "found": headline(lines, stage.name),
        "detail": end.get("detail", "")[:DETAIL_WIDTH],
    }
