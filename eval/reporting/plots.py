"""How every figure looks: ours in colour, baselines grey, readable on white and on black."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

OURS = "#2f81f7"
OTHER = "#8a8f98"
"""Baselines, all of one grey: markers and line styles tell them apart."""
LIMIT = "#d29922"
"""What nobody can pass."""
INK = "#767b84"
"""Text and axes: contrast of at least 4 on white and on GitHub's black."""
MARKERS = ("s", "D", "^", "v", "P", "X", "<", ">", "p", "h")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1)), (0, (1, 3)))
STYLE = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.6,
}
LEAST_GAP = 0.065
"""Of the axes' height, between two labels at the ends of lines."""


class Series(NamedTuple):
    """One system's values, one for each line of a dot plot; None where it has none."""

    name: str
    values: Sequence[float | None]
    colour: str = OTHER


def dots(axes: Any, places: Sequence[str], series: Sequence[Series], log: bool = False) -> None:
    """A dot plot: a line for each place, a marker for each system; ours is drawn last and large.

    The legend lies below the axes.
    """
    rows = range(len(places))
    markers = iter(MARKERS * (1 + len(series) // len(MARKERS)))
    for one in sorted(series, key=lambda found: found.colour == OURS):
        plain = one.colour == OTHER
        found = [(x, y) for x, y in zip(one.values, rows, strict=True) if x is not None]
        axes.plot(
            [x for x, _ in found],
            [y for _, y in found],
            linestyle="none",
            marker=next(markers) if plain else "o",
            markersize=6.5 if plain else 10,
            markerfacecolor="none" if one.colour == LIMIT else one.colour,
            markeredgecolor=one.colour,
            markeredgewidth=1.8 if one.colour == LIMIT else 1,
            alpha=0.85 if plain else 1,
            label=one.name,
            zorder=2 if plain else 3,
        )
    axes.set_yticks(rows, places)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    for row in rows:
        axes.axhline(row, color=INK, alpha=0.25, linewidth=0.7, zorder=1)
    if log:
        axes.set_xscale("log")
    below(axes)


def title_across(figure: Any, axes: Any) -> None:
    """Let the title begin at the figure's left edge, where a long one has room."""
    figure.suptitle(axes.get_title(), x=0.01, ha="left")
    axes.set_title("")


def below(axes: Any, columns: int = 3) -> None:
    """The legend under the axes, ours first."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: not labels[place].startswith("ours"))
    axes.figure.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="outside lower center",
        ncols=columns,
    )


def label_ends(axes: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write each line's name behind its last point, (text, y, colour), without overlaps."""
    low, high = axes.get_ylim()
    gap = LEAST_GAP * (high - low)
    place = low - gap
    for text, value, colour in sorted(ends, key=lambda end: end[1]):
        place = max(value, place + gap)
        axes.annotate(
            text,
            (1.01, place),
            xycoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontweight="bold" if colour == OURS else "normal",
            annotation_clip=False,
        )


def bars(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float],
    form: str,
    colours: Sequence[str] = (),
) -> None:
    """Horizontal bars, each with its value behind it; without colours the first of them is ours."""
    places = range(len(names))
    colours = colours or [OURS] + [OTHER] * (len(names) - 1)
    drawn = axes.barh(places, values, color=colours, height=0.65)
    axes.bar_label(drawn, [form.format(value) for value in values], padding=4, color=INK)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.14)
