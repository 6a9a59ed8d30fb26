"""What every question shares: a table on stdout, CSV and PNG in `--out`, one JSON line at the end."""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import logging
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent

Row = Mapping[str, Any]


def parser(description: str) -> argparse.ArgumentParser:
    """`--out` and `--quick`, which all questions take."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, default=Path("out"), help="folder for CSV and PNG (default out)")
    made.add_argument("--quick", action="store_true", help="fewer cases, for a look in under a minute")
    return made


def facts() -> dict[str, str]:
    """Hardware, versions, commit and date, which every CSV row carries."""
    from hybrimoe_plugin.experts.calibrate import hardware, versions

    here = Path(__file__).resolve().parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = hardware()
    machine["os"] = machine.pop("system")  # tables have a column `system` of their own
    return {**machine, **versions(), "commit": commit or "unknown", "date": datetime.date.today().isoformat()}


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a table; floats with three significant digits."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)


def save_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with the facts of this machine beside each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = facts()
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *known])
        writer.writeheader()
        writer.writerows({**row, **known} for row in rows)


def save_figure(path: Path, draw: Any, width: float = 7.0, height: float = 4.0) -> None:
    """Draw with matplotlib into a PNG; without matplotlib say so and go on."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        log.warning("no figure: matplotlib is not installed (pip install 'ktransformers-hybrimoe[figures]')")
        return
    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    draw(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def finish(result: Mapping[str, Any]) -> None:
    """The last line of stdout: one JSON object."""
    print(json.dumps(dict(result)), flush=True)
