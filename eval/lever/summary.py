"""From the cells of `eval.lever` to its table and JSON line."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean, mean
from typing import Any, NamedTuple

from eval.reporting.rows import column, where

Row = dict[str, Any]
AR, OURS = "flash autoregressive", "lever"
OURS_TOO = (OURS, "lever, no overlap", "lever, cost without union")
"""Not other trees: ours with parts switched off."""
DRAFT = "low-bit 65 %"
MEANS = (
    "acceptance_length",
    "rows",
    "draft_ms",
    "wait_ms",
    "cycle_ms",
    "predicted_ms",
    "read_mb",
)
"""Columns of which the table has the mean over prompts."""


class Group(NamedTuple):
    """Cells that are alike in all but the prompt and the tree."""

    target: str
    draft: str
    share: float
    """Of layers in DRAM; below 0 the target's own budget."""
    label: str

    @classmethod
    def of(cls, row: Row) -> Group:
        """The group that a row belongs to."""
        return cls(row["target"], row["draft"], row["dram_share"], row["label"])


def tree_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows that hold a speed; others hold a value."""
    return [row for row in rows if row["tokens_per_s"] != ""]


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row for each group of cells and tree: means over the prompts."""
    members: dict[tuple[Group, str], list[Row]] = {}
    for row in tree_rows(rows):
        key = Group.of(row), row["tree"]
        members.setdefault(key, []).append(row)
    table = []
    for (group, tree), mine in members.items():
        plain = members.get((group, AR), [])
        table.append(_table_row(group, tree, mine, plain))
    return table


def _table_row(group: Group, tree: str, rows: Sequence[Row], plain: Sequence[Row]) -> Row:
    """One line of the table.

    Args:
        rows: of one tree, one for each prompt.
        plain: of plain decoding of the same prompts.
    """
    speeds = column(rows, "tokens_per_s")
    ratios = _speedups(rows, plain)
    made = {
        "target": group.target,
        "draft": group.draft,
        "agreement": round(mean(column(rows, "agreement")), 3),
        "dram_share": group.share,
        "label": group.label,
        "tree": tree,
        "prompts": len(rows),
        "tokens_per_s": round(geometric_mean(speeds), 3),
        "speedup": round(geometric_mean(ratios), 3) if ratios else "",
    }
    for name in MEANS:
        made[name] = round(mean(column(rows, name)), 2)
    return made


def _speedups(rows: Sequence[Row], plain: Sequence[Row]) -> list[float]:
    """Speed over that of plain decoding of the same prompt."""
    found = []
    for row in rows:
        for other in where(plain, prompt=row["prompt"]):
            found.append(row["tokens_per_s"] / other["tokens_per_s"])
    return found


def measured(
    table: Sequence[Row],
    target: str,
    draft: str = DRAFT,
    share: float = -1.0,
) -> list[Row]:
    """The table's rows of one group, without those of throttled reads."""
    wanted = Group(target, draft, share, "measured")
    return [row for row in table if Group.of(row) == wanted]


def results(rows: Sequence[Row], table: Sequence[Row]) -> dict[str, Any]:
    """The JSON line; None where the cells it needs were not run."""
    dense = {row["tree"]: float(row["tokens_per_s"]) for row in measured(table, "dense")}
    moe = {row["tree"]: float(row["tokens_per_s"]) for row in measured(table, "mixtral")}
    shares = column(where(rows, tree="read share"), "value")
    same = [row["value"] for row in rows if str(row["tree"]).endswith("identical")]
    return {
        "speedup_vs_flash_ar": _ratio(dense, AR),
        "speedup_vs_chain8": _ratio(dense, "chain 8"),
        "speedup_vs_specinfer": _ratio(dense, "specinfer"),
        "speedup_vs_best_tree": _ratio(dense, _best_other(dense)),
        "moe_speedup_vs_best_twin": _ratio(moe, _best_other(moe)),
        "read_share": shares[-1] if shares else None,
        "token_identical": bool(same) and all(same),
    }


def _best_other(speeds: dict[str, float]) -> str:
    """The fastest tree that is not ours, plain decoding included; "" if there is none."""
    others = [tree for tree in speeds if tree not in OURS_TOO]
    return max(others, key=lambda tree: speeds[tree], default="")


def _ratio(speeds: dict[str, float], other: str) -> float | None:
    """Our speed over another tree's."""
    if OURS not in speeds or other not in speeds:
        return None
    return round(speeds[OURS] / speeds[other], 3)
