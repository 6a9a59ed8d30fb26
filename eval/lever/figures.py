"""The figures of `eval.lever`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.lever.summary import AR, OURS, Row, tree_rows
from eval.reporting import plots
from eval.reporting.rows import column, distinct, has, where

FAMILIES = {
    "chain": "chain, its best length",
    "specinfer": "SpecInfer-like, its best shape",
    "opt_tree": "OPT-Tree-like, its best size",
    "fixed": "fixed tree, its best size",
    "greedy": "greedy tree",
    OURS: "ours",
}
"""First word of a tree's name -> what figures call it. Ours with parts left out is not drawn."""
PLAIN = "plain decoding"

Group = tuple[str, str]
"""Target and draft."""


def draw_speedups(axes: Any, rows: Sequence[Row]) -> None:
    """Speed-up over flash autoregressive decoding, a dot for the best tree of each family.

    Args:
        axes: matplotlib's; there is one line for each target and draft.
        rows: of the table that `eval.lever.summary` makes.
    """
    mine = [row for row in rows if _has_dot(row)]
    groups = list(dict.fromkeys(_group(row) for row in mine))
    series = []
    for family, label in FAMILIES.items():
        best = [_best(mine, family, group) for group in groups]
        if any(best):
            series.append(plots.Series(label, best, _colour(family)))
    axes.axvline(1, color=plots.OTHER, linestyle="--")
    places = [f"{_form(target)}\n{draft} draft" for target, draft in groups]
    plots.dots(axes, places, series)
    gains = [where(mine, tree=OURS, target=target, draft=draft) for target, draft in groups]
    speeds = [float(found[0]["speedup"]) for found in gains if found]
    if speeds:
        spread = f"{min(speeds):.2f}x to {max(speeds):.2f}x"
        axes.set_title(f"Ours decodes {spread} as fast as {PLAIN} from flash")
    axes.set_xlabel(f"speed-up over {PLAIN} (dashed), measured")


def draw_shares(axes: Any, rows: Sequence[Row]) -> None:
    """Decode speed against the share of layers in DRAM, one line for each tree.

    Args:
        axes: matplotlib's.
        rows: of the cells of `eval.lever`.
    """
    mine = [row for row in tree_rows(rows) if row["dram_share"] >= 0]
    styles = iter(plots.DASHES)
    ends = []
    for tree in distinct(mine, "tree"):
        of_tree = where(mine, tree=tree)
        of_tree.sort(key=lambda row: row["dram_share"])
        speeds = column(of_tree, "tokens_per_s")
        percents = [100 * share for share in column(of_tree, "dram_share")]
        colour = _colour(tree)
        if tree == OURS:
            axes.plot(percents, speeds, color=colour, marker="o", linewidth=3)
        else:
            axes.plot(percents, speeds, color=colour, linestyle=next(styles, "-"))
        ends.append((_name(tree), speeds[-1], colour))
    if ends:
        plots.label_ends(axes, ends)
    axes.set_title("Decode speed of each tree by the memory it has")
    axes.set_xlabel("layers in memory, %")
    axes.set_ylabel("decode tokens/s (measured)")


def _colour(tree: str) -> str:
    return plots.OURS if tree == OURS else plots.OTHER


def _name(tree: str) -> str:
    """What a figure calls a tree with its size."""
    if tree == AR:
        return PLAIN
    names = {"specinfer": "SpecInfer-like", "opt_tree": "OPT-Tree-like", OURS: "ours"}
    family, _, size = tree.partition(" ")
    return f"{names.get(family, family)} {size}".strip()


def _form(target: str) -> str:
    return "dense" if target == "dense" else "MoE"


def _best(rows: Sequence[Row], family: str, group: Group) -> float | None:
    """The best speed-up of a family of trees in a group; None where it was not run."""
    found = []
    for row in rows:
        is_family = row["tree"] == OURS if family == OURS else row["tree"].split()[0] == family
        if is_family and _group(row) == group:
            found.append(float(row["speedup"]))
    return max(found, default=None)


def _has_dot(row: Row) -> bool:
    """Measured without throttling, in the target's own memory budget, with a speed-up."""
    if row["speedup"] == "":
        return False
    return has(row, dram_share=-1.0, label="measured")


def _group(row: Row) -> Group:
    return row["target"], row["draft"]
