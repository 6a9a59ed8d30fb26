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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from eval import report
from eval.lever_cells import CELLS, QUICK_CELLS, Cell
from eval.lever_lab import Lab
from eval.lever_summary import draw_shares, draw_speedups, results, summary

log = logging.getLogger(__name__)
CELLS_CSV = "lever_cells.csv"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the question; gives what the JSON line says."""
    parser = report.parser(__doc__ or "")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="stop between two cells after so many minutes"
    )
    parser.add_argument("--only", default="", help="run only cells whose name begins so")
    args = parser.parse_args(arguments)
    cells = QUICK_CELLS if args.quick else CELLS
    path = args.out / ("lever_quick_cells.csv" if args.quick else CELLS_CSV)
    if args.quick:
        path.unlink(missing_ok=True)
    rows = run_cells(
        [cell for cell in cells if cell.name.startswith(args.only)], path, 60 * args.minutes
    )
    table = summary(rows)
    if table:
        report.show("Decode speed, geometric means over prompts (measured unless labelled)", table)
        report.save_csv(args.out / ("lever_quick.csv" if args.quick else "lever.csv"), table)
    if not args.quick:
        report.save_figure(
            args.out / "lever_speedup.png", lambda axes: draw_speedups(axes, table), width=9.0
        )
        report.save_figure(args.out / "lever_dram.png", lambda axes: draw_shares(axes, rows))
    missing = [cell.name for cell in cells if not any(row["cell"] == cell.name for row in rows)]
    if missing:
        log.warning(
            "%d of %d cells are still to be run: %s",
            len(missing),
            len(cells),
            ", ".join(missing[:4]),
        )
    result = results(rows, table)
    report.finish(result)
    return result


def run_cells(cells: Iterable[Cell], path: Path, seconds: float) -> list[dict[str, Any]]:
    """Rows of all cells, those from earlier runs included; each cell's rows are written as soon as
    it has ended.
    """
    rows = read_rows(path)
    done = {row["cell"] for row in rows}
    lab, begin, facts = Lab(), time.perf_counter(), report.facts()
    try:
        for cell in cells:
            if cell.name in done:
                continue
            if time.perf_counter() - begin > seconds:
                break
            made = [{"cell": cell.name, **row, **facts} for row in cell.run(lab)]
            append_rows(path, made)
            rows += made
    finally:
        lab.close()
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, numbers as numbers."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def _number(text: str) -> Any:
    kinds: tuple[Callable[[str], Any], ...] = (int, float)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    main()
