"""How much does speculation gain when the target is streamed from flash, and which tree gains most?

Measured with real, unthrottled direct reads. A run is made of cells, one for a target, a draft and
a prompt; within a cell all tree policies decode the same texts side by side, taking turns after
every cycle, and speed-ups are ratios within a cell. Finished cells are kept in
`lever_cells.csv`: the same command goes on where it was stopped (`--minutes` stops it between two
cells).
"""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.lever.cell import Cell
from eval.lever.cells import CELLS, QUICK_CELLS
from eval.lever.figures import draw_shares, draw_speedups
from eval.lever.lab import Lab
from eval.lever.summary import results, summary
from eval.reporting import report

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives the contents of the JSON line."""
    parser = report.parser(__doc__ or "", "python -m eval.lever")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="stop between two cells after so many minutes"
    )
    parser.add_argument("--only", default="", help="run only cells whose name begins so")
    args = parser.parse_args(arguments)
    cells = QUICK_CELLS if args.quick else CELLS
    name = "lever_quick" if args.quick else "lever"
    path = args.out / f"{name}_cells.csv"
    if args.quick:
        path.unlink(missing_ok=True)
    chosen = [cell for cell in cells if cell.name.startswith(args.only)]
    rows = run_cells(chosen, path, 60 * args.minutes)
    table = summary(rows)
    if table:
        report.show("Decode speed, geometric means over prompts (measured unless labelled)", table)
        report.save_csv(args.out / f"{name}.csv", table)
        speedups = args.out / "lever_speedup.png"
        report.save_figure(speedups, lambda axes: draw_speedups(axes, table))
    if not args.quick:
        report.save_figure(args.out / "lever_dram.png", lambda axes: draw_shares(axes, rows))
    done = {row["cell"] for row in rows}
    missing = [cell.name for cell in cells if cell.name not in done]
    if missing:
        some = ", ".join(missing[:4])
        log.warning("%d of %d cells are still to be run: %s", len(missing), len(cells), some)
    result = results(rows, table)
    report.finish(result)
    return result


def run_cells(cells: Iterable[Cell], path: Path, seconds: float) -> list[dict[str, Any]]:
    """Rows of all cells, those from earlier runs included.

    Each cell's rows are written as soon as it has ended.
    """
    rows = report.read_csv(path) if path.exists() else []
    done = {row["cell"] for row in rows}
    facts = report.facts()
    lab = Lab()
    deadline = time.monotonic() + seconds
    try:
        for cell in cells:
            if cell.name in done:
                continue
            if time.monotonic() > deadline:
                break
            made = [{"cell": cell.name, **row, **facts} for row in cell.run(lab)]
            append_rows(path, made)
            rows += made
    finally:
        lab.close()
    return rows


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a CSV, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
