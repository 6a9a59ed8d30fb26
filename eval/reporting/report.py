"""What every question prints and saves: a table, CSV and PNG files, one JSON line."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import logging
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.reporting import plots
from eval.reporting.tables import show as show

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

COMMIT_VARIABLE = "HYBRIMOE_COMMIT"

Row = Mapping[str, Any]


def parser(description: str, prog: str | None = None) -> argparse.ArgumentParser:
    """`--out` and `--quick`, which all questions take.

    Args:
        prog: the command; needed where a package is run, whose file is called `__main__.py`.
    """
    made = argparse.ArgumentParser(prog=prog, description=description)
    made.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for CSV and PNG (default out)"
    )
    made.add_argument(
        "--quick", action="store_true", help="fewer cases, for a look in under a minute"
    )
    return made


def facts() -> dict[str, str]:
    """Hardware, driver, versions, commit and date, which every CSV row carries.

    Missing ones are `none` or `unknown`.
    """
    from hybrimoe_plugin.device.machine import hardware, versions

    machine = hardware()
    machine["os"] = machine.pop("system")  # tables have a column `system` of their own
    more = {name: _version(name) for name in ("triton", "transformers")}
    today = datetime.date.today().isoformat()
    return {
        **machine,
        "driver": _driver(machine["gpu"]),
        **versions(),
        **more,
        "commit": commit(),
        "date": today,
    }


def commit() -> str:
    """The code's commit: from HYBRIMOE_COMMIT, else from git, else `unknown`.

    The variable is for machines that the tree reaches without its `.git`.
    """
    told = os.environ.get(COMMIT_VARIABLE, "").strip()
    if told:
        return told
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        )
    except (
        OSError,
        subprocess.SubprocessError,
    ):  # no git, no repository, or one that git refuses to read
        return "unknown"
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def nvidia_smi(field: str) -> list[str] | None:
    """A field of each GPU, such as `name`, as the NVIDIA driver's tool gives it.

    None where the tool does not answer.
    """
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=15)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.strip() for line in done.stdout.splitlines()]


def _driver(gpu: str) -> str:
    """The NVIDIA driver's version, `none` without a GPU."""
    found = None if gpu == "none" else nvidia_smi("driver_version")
    return found[0] if found else "none"


def save_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with the facts of this machine beside each.

    Facts that a row has already are left as they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = facts()
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*rows[0], *known])))
        writer.writeheader()
        writer.writerows({**known, **row} for row in rows)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """A CSV's rows, with numbers and truth values in place of their texts."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: _value(text) for name, text in row.items()} for row in rows]


def _value(text: str) -> Any:
    kinds: tuple[Callable[[str], Any], ...] = (int, float)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(text, text)


def save_figure(path: Path, draw: Any, width: float = 8.0, height: float = 4.0) -> None:
    """Draw with matplotlib into a PNG without background; without matplotlib say so and go on."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        log.warning(
            "no figure: matplotlib is not installed (pip install 'ktransformers-hybrimoe[figures]')"
        )
        return
    with matplotlib.rc_context(plots.STYLE):
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        draw(axes)
        plots.title_across(figure, axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200, transparent=True)
        pyplot.close(figure)


def publish(
    title: str, rows: Sequence[Row], place: Path, draw: Callable[..., None], height: float = 4.0
) -> None:
    """Print a question's one table and save it, and the figure of it.

    Args:
        place: path of both files, without their suffixes.
        draw: takes the axes and the rows.
        height: of the figure, in inches.
    """
    show(title, rows)
    save_csv(place.parent / f"{place.name}.csv", rows)  # a name may have dots of its own
    save_figure(place.parent / f"{place.name}.png", lambda axes: draw(axes, rows), height=height)


def finish(result: Mapping[str, Any]) -> None:
    """The last line of stdout: one JSON object."""
    print(json.dumps(dict(result)), flush=True)
