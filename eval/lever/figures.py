"""The figures of `eval.lever`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.lever.summary import AR, OURS, Row, tree_rows
from eval.reporting.rows import column, distinct, has, where

BARS_WIDTH = 0.85
COLOURS = 10
"""Of matplotlib's cycle; a second round of them is hatched."""

Group = tuple[str, str]
"""Target and draft."""


def draw_speedups(axes: Any, rows: Sequence[Row]) -> None:
    """Speed-up over flash autoregressive decoding by tree.

    Args:
        axes: matplotlib's; there is one group of bars for each target and draft.
        rows: of the table that `eval.lever.summary` makes.
    """
    mine = [row for row in rows if _has_bar(row)]
    groups = list(dict.fromkeys(_group(row) for row in mine))
    trees = distinct(mine, "tree")
    for last in (AR, OURS):
        if last in trees:
            trees.remove(last)
    trees.append(OURS)
    width = BARS_WIDTH / max(1, len(trees))
    for index, tree in enumerate(trees):
        heights = _heights(where(mine, tree=tree), groups)
        places = [at + index * width for at in range(len(groups))]
        style: dict[str, Any] = {}
        if tree == OURS:
            style["color"] = "black"
        elif index >= COLOURS:
            style["hatch"] = "//"
        axes.bar(places, heights, width, label=tree, **style)
    axes.axhline(1, color="black", linewidth=0.7)
    ticks = [at + 0.4 for at in range(len(groups))]
    labels = [f"{target}\n{draft}" for target, draft in groups]
    axes.set_xticks(ticks, labels)
    axes.set_ylabel("speed-up over flash autoregressive (measured)")
    if groups:
        axes.legend(fontsize=7, ncols=2, loc="upper right")


def draw_shares(axes: Any, rows: Sequence[Row]) -> None:
    """Decode speed against the share of layers in DRAM, one line for each tree.

    Args:
        axes: matplotlib's.
        rows: of the cells of `eval.lever`.
    """
    mine = [row for row in tree_rows(rows) if row["dram_share"] >= 0]
    for tree in distinct(mine, "tree"):
        of_tree = where(mine, tree=tree)
        of_tree.sort(key=lambda row: row["dram_share"])
        speeds = column(of_tree, "tokens_per_s")
        percents = [100 * share for share in column(of_tree, "dram_share")]
        axes.plot(percents, speeds, marker="o", label=tree)
    axes.set_xlabel("layers in DRAM, %")
    axes.set_ylabel("decode tokens/s (measured)")
    if mine:
        axes.legend(fontsize=8)


def _has_bar(row: Row) -> bool:
    """Measured without throttling, in the target's own memory budget, with a speed-up."""
    if row["speedup"] == "":
        return False
    return has(row, dram_share=-1.0, label="measured")


def _heights(rows: Sequence[Row], groups: Sequence[Group]) -> list[float]:
    """The speed-up in each group; 0 where there is none."""
    values = {_group(row): row["speedup"] for row in rows}
    return [values.get(group, 0) for group in groups]


def _group(row: Row) -> Group:
    return row["target"], row["draft"]
