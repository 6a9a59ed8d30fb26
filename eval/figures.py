"""The README's figures, drawn from the committed CSVs in `eval/results/`: nothing is measured here.

Each figure is drawn by the code of the question that wrote its CSV; a CSV that is not there is left
out with a notice.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval import cache, fidelity, lever_summary, prefetch, replay, report, schedule, throughput

log = logging.getLogger(__name__)

RESULTS = report.ROOT / "eval" / "results"
Draw = Callable[[Any, Sequence[dict[str, Any]]], None]
FIGURES: dict[str, tuple[Draw, float, float]] = {
    # CSV: (who draws it, width, height)
    "schedule_gap.csv": (schedule._draw, 7.0, 4.0),
    "cache.csv": (cache._draw, 7.0, 4.0),
    "prefetch.csv": (prefetch._draw, 7.0, 4.0),
    "replay.csv": (replay._draw, 9.0, 4.0),
    "throughput_demo.csv": (throughput._draw, 7.0, 3.2),
    "throughput_deepseek-v2-lite.csv": (throughput._draw, 7.0, 3.2),
    "fidelity.csv": (fidelity._draw, 7.0, 2.6),
    "lever.csv": (lever_summary.draw_speedups, 9.0, 4.0),
    "lever_amx.csv": (lever_summary.draw_speedups, 9.0, 4.0),
    "lever_cells.csv": (lever_summary.draw_shares, 7.0, 4.0),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Draw what there is; gives the figures' names."""
    parser = report.parser(__doc__ or "")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the CSVs")
    parser.set_defaults(out=report.ROOT / "docs" / "figures")
    args = parser.parse_args(arguments)
    drawn = []
    for name, (draw, width, height) in FIGURES.items():
        source = args.results / name
        if not source.exists():
            log.warning("%s is not there: no figure of it", source)
            continue
        rows = read_rows(source)
        target = args.out / f"{source.stem}.png"
        report.save_figure(target, lambda axes: draw(axes, rows), width, height)  # noqa: B023
        drawn.append(target.name)
    result = {"figures": drawn}
    report.finish(result)
    return result


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A CSV's rows with numbers as numbers."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(text, text)


if __name__ == "__main__":
    main()
