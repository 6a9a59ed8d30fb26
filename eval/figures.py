"""The figures of docs/benchmarks.md, drawn from the committed CSVs in `eval/results/`.

Nothing is measured here.

Each figure is drawn by the code of the question that wrote its CSV, or here where it is of several.
One whose CSV is not there is left out with a notice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from eval import batches, cache, fidelity, prefetch, replay, schedule, throughput
from eval import rows as rows_question
from eval.lever import figures as lever
from eval.reporting import plots, report
from eval.reporting.rows import column, distinct, where
from eval.serving import question as serving


class Draw(Protocol):
    """Draws rows into matplotlib's axes."""

    def __call__(self, axes: Any, rows: Sequence[dict[str, Any]]) -> None: ...


log = logging.getLogger(__name__)

RESULTS = report.ROOT / "eval" / "results"
MODELS = ("demo", "deepseek-v2-lite", "qwen3-30b-a3b")
CPU = tuple(
    f"throughput_{model}{length}.csv" for model in MODELS for length in ("", "_2048-tokens")
)
BATCHES = {f"batches_{model}": model for model in MODELS}


class Figure(NamedTuple):
    """One figure: its CSVs, whose rows are drawn together, and its size in inches."""

    sources: tuple[str, ...]
    draw: Draw
    width: float = 8.0
    height: float = 4.0


def draw_cpu(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Decode speed of ours and its peers for each model and prompt length.

    Behind each line stands ours over the fastest peer. A peer that was not measured everywhere is
    left out.
    """
    places = distinct(rows, "source")
    ours = [_decode(rows, place, throughput.OURS) for place in places]
    peers = {name: [_decode(rows, place, name) for place in places] for name in throughput.PEERS}
    peers = {name: speeds for name, speeds in peers.items() if None not in speeds}
    labels = [_place(where(rows, source=place)[0]) for place in places]
    series = [plots.Series("ours", ours, plots.OURS)]
    series += [plots.Series(name, speeds) for name, speeds in peers.items()]
    plots.dots(axes, labels, series, log=True)
    ratios = [mine / max(others) for mine, *others in zip(ours, *peers.values(), strict=True)]
    for row, ratio in enumerate(ratios):
        side = axes.get_yaxis_transform()
        text = f"{ratio:.2f}x"
        axes.annotate(text, (1.02, row), xycoords=side, va="center", annotation_clip=False)
    ticks = (10, 20, 50, 100)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    least, most = min(ratios), max(ratios)
    other = "the fastest peer" if len(peers) > 1 else next(iter(peers))
    axes.set_title(f"On two CPU cores, decode runs at {least:.2f}x to {most:.2f}x of {other}")
    axes.set_xlabel("decode, tokens per second (measured)")


def _decode(rows: Sequence[dict[str, Any]], source: str, system: str) -> Any:
    """None where the system was not measured."""
    found = where(rows, source=source, system=system)
    return found[0]["decode_tok_s"] if found else None


def _place(row: dict[str, Any]) -> str:
    model = row["source"].removeprefix("throughput_").partition("_")[0]
    name = "demo model" if model == "demo" else model
    return f"{name}, {row['prompt_tokens']:,} prompt tokens"


def draw_batches(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Tokens per second over the conversations that a call decodes together, a line for a model."""
    ends = []
    for source, model in BATCHES.items():
        mine = where(rows, source=source, kind=batches.CONVERSATIONS)
        counts, speeds = column(mine, "rows"), column(mine, "tok_s")
        colour = plots.OURS if model == "demo" else plots.OTHER
        axes.plot(counts, speeds, color=colour, marker="o")
        ends.append(("demo model" if model == "demo" else model, speeds[-1], colour))
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    plots.label_ends(axes, ends)
    axes.set_title("More conversations a call give more tokens per second on two CPU cores")
    axes.set_xlabel("conversations decoded together")
    axes.set_ylabel("tokens per second (measured)")


FIGURES = {
    "schedule_gap": Figure(("schedule_gap.csv",), schedule.draw),
    "cache": Figure(("cache.csv",), cache.draw),
    "prefetch": Figure(("prefetch.csv",), prefetch.draw),
    "replay": Figure(("replay.csv",), replay.draw, height=4.6),
    "rows": Figure(("rows_cells.csv",), rows_question.draw),
    "cpu_decode": Figure(CPU, draw_cpu),
    "batches": Figure(tuple(f"{name}.csv" for name in BATCHES), draw_batches),
    "serving": Figure(("serving_demo.csv",), serving.draw),
    "throughput_demo": Figure(("throughput_demo.csv",), throughput.draw, height=3.2),
    "fidelity": Figure(("fidelity.csv",), fidelity.draw, height=2.6),
    "lever": Figure(("lever.csv",), lever.draw_speedups, height=4.6),
    "lever_amx": Figure(("lever_amx.csv",), lever.draw_speedups, height=3.4),
    "lever_cells": Figure(("lever_cells.csv",), lever.draw_shares),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Draw what there is; gives the figures' names."""
    parser = report.parser(__doc__ or "")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the CSVs")
    parser.set_defaults(out=report.ROOT / "docs" / "figures")
    args = parser.parse_args(arguments)
    drawn = []
    for name, figure in FIGURES.items():
        rows = rows_of(args.results, figure.sources)
        if rows is None:
            continue
        target = args.out / f"{name}.png"
        report.save_figure(target, partial(figure.draw, rows=rows), figure.width, figure.height)
        drawn.append(target.name)
    result = {"figures": drawn}
    report.finish(result)
    return result


def rows_of(folder: Path, sources: Sequence[str]) -> list[dict[str, Any]] | None:
    """The rows of a figure's CSVs, each with its `source`; None where one is not there."""
    rows = []
    for name in sources:
        path = folder / name
        if not path.exists():
            log.warning("%s is not there: no figure of it", path)
            return None
        rows += [{**row, "source": path.stem} for row in report.read_csv(path)]
    return rows


if __name__ == "__main__":
    main()
