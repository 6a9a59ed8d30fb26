"""The figures of docs/benchmarks.md, drawn from the committed CSVs in `eval/results/`.

Nothing is measured here.

Each figure is drawn by the code of the question that wrote its CSV; a CSV that is not there is left
out with a notice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from eval import cache, fidelity, prefetch, replay, schedule, throughput
from eval.lever import figures as lever
from eval.reporting import report


class Draw(Protocol):
    """Draws rows into matplotlib's axes."""

    def __call__(self, axes: Any, rows: Sequence[dict[str, Any]]) -> None: ...


log = logging.getLogger(__name__)

RESULTS = report.ROOT / "eval" / "results"
FIGURES: dict[str, tuple[Draw, float, float]] = {
    # CSV: (what draws it, width, height)
    "schedule_gap.csv": (schedule.draw, 7.0, 4.0),
    "cache.csv": (cache.draw, 7.0, 4.0),
    "prefetch.csv": (prefetch.draw, 7.0, 4.0),
    "replay.csv": (replay.draw, 9.0, 4.0),
    "throughput_demo.csv": (throughput.draw, 7.0, 3.2),
    "throughput_deepseek-v2-lite.csv": (throughput.draw, 7.0, 3.2),
    "fidelity.csv": (fidelity.draw, 7.0, 2.6),
    "lever.csv": (lever.draw_speedups, 9.0, 4.0),
    "lever_amx.csv": (lever.draw_speedups, 9.0, 4.0),
    "lever_cells.csv": (lever.draw_shares, 7.0, 4.0),
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
        target = args.out / f"{source.stem}.png"
        rows = report.read_csv(source)
        report.save_figure(target, partial(draw, rows=rows), width, height)
        drawn.append(target.name)
    result = {"figures": drawn}
    report.finish(result)
    return result


if __name__ == "__main__":
    main()
