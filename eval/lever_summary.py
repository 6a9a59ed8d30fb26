"""From the cells of `eval.lever` to its table, figures and JSON line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
AR, OURS = "flash autoregressive", "lever"
OURS_TOO = (OURS, "lever, no overlap", "lever, cost without union")
"""Not other trees: ours with parts switched off."""
DRAFT = "low-bit 65 %"


def tree_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["tokens_per_s"] != ""]


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row for each group of cells (all but the prompt equal) and tree: means over the
    prompts.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in tree_rows(rows):
        key = (row["target"], row["draft"], row["dram_share"], row["label"], row["tree"])
        groups.setdefault(key, []).append(row)
    made = []
    for (target, draft, share, label, tree), members in groups.items():
        plain = groups.get((target, draft, share, label, AR), [])
        ratios = [
            row["tokens_per_s"] / other["tokens_per_s"]
            for row in members
            for other in plain
            if other["prompt"] == row["prompt"]
        ]
        made.append(
            {
                "target": target,
                "draft": draft,
                "agreement": round(statistics.mean(row["agreement"] for row in members), 3),
                "dram_share": share,
                "label": label,
                "tree": tree,
                "prompts": len(members),
                "tokens_per_s": round(
                    statistics.geometric_mean(row["tokens_per_s"] for row in members), 3
                ),
                "speedup": round(statistics.geometric_mean(ratios), 3) if ratios else "",
                **{
                    name: round(statistics.mean(row[name] for row in members), 2)
                    for name in (
                        "acceptance_length",
                        "rows",
                        "draft_ms",
                        "wait_ms",
                        "cycle_ms",
                        "predicted_ms",
                        "read_mb",
                    )
                },
            }
        )
    return made


def best_other(
    table: Sequence[Row], target: str, draft: str = DRAFT, share: float = -1.0
) -> Row | None:
    """The fastest tree that is not ours, plain decoding included, each with its best setting."""
    found = [
        row
        for row in table
        if row["target"] == target
        and row["draft"] == draft
        and row["dram_share"] == share
        and row["label"] == "measured"
        and row["tree"] not in OURS_TOO
    ]
    return max(found, key=lambda row: float(row["tokens_per_s"]), default=None)


def results(rows: Sequence[Row], table: Sequence[Row]) -> dict[str, Any]:
    """The JSON line; None where the cells it needs were not run."""

    def speed(tree: str, target: str = "dense") -> float | None:
        found = [
            row["tokens_per_s"]
            for row in table
            if (row["target"], row["draft"], row["dram_share"], row["tree"])
            == (target, DRAFT, -1.0, tree)
            and row["label"] == "measured"
        ]
        return float(found[0]) if found else None

    def ratio(ours: float | None, theirs: float | None) -> float | None:
        return round(ours / theirs, 3) if ours and theirs else None

    tree, moe = best_other(table, "dense"), best_other(table, "mixtral")
    shares = [row["value"] for row in rows if row["tree"] == "read share"]
    same = [row["value"] for row in rows if str(row["tree"]).endswith("identical")]
    return {
        "speedup_vs_flash_ar": ratio(speed(OURS), speed(AR)),
        "speedup_vs_chain8": ratio(speed(OURS), speed("chain 8")),
        "speedup_vs_specinfer": ratio(speed(OURS), speed("specinfer")),
        "speedup_vs_best_tree": ratio(speed(OURS), float(tree["tokens_per_s"]) if tree else None),
        "moe_speedup_vs_best_twin": ratio(
            speed(OURS, "mixtral"), float(moe["tokens_per_s"]) if moe else None
        ),
        "read_share": shares[-1] if shares else None,
        "token_identical": bool(same) and all(same),
    }


def draw_speedups(axes: Any, table: Sequence[Row]) -> None:
    """Speed-up over flash autoregressive decoding by tree, one group of bars for each target and
    draft.
    """
    mine = [
        row
        for row in table
        if row["dram_share"] == -1.0 and row["label"] == "measured" and row["speedup"] != ""
    ]
    groups = list(dict.fromkeys((row["target"], row["draft"]) for row in mine))
    trees = [
        tree for tree in dict.fromkeys(row["tree"] for row in mine) if tree not in (AR, OURS)
    ] + [OURS]
    width = 0.85 / max(1, len(trees))
    for index, tree in enumerate(trees):
        values = {
            (row["target"], row["draft"]): row["speedup"] for row in mine if row["tree"] == tree
        }
        places = [at + index * width for at in range(len(groups))]
        # Ten colours; a second round of them is hatched.
        style = {"color": "black"} if tree == OURS else {"hatch": "//" if index >= 10 else None}
        axes.bar(places, [values.get(group, 0) for group in groups], width, label=tree, **style)
    axes.axhline(1, color="black", linewidth=0.7)
    axes.set_xticks(
        [at + 0.4 for at in range(len(groups))], [f"{target}\n{draft}" for target, draft in groups]
    )
    axes.set_ylabel("speed-up over flash autoregressive (measured)")
    if groups:
        axes.legend(fontsize=7, ncols=2, loc="upper right")


def draw_shares(axes: Any, rows: Sequence[Row]) -> None:
    """Decode speed against the share of layers in DRAM."""
    mine = [row for row in tree_rows(rows) if row["dram_share"] >= 0]
    for tree in dict.fromkeys(row["tree"] for row in mine):
        points = sorted(
            (row["dram_share"], row["tokens_per_s"]) for row in mine if row["tree"] == tree
        )
        axes.plot(
            [100 * share for share, _ in points],
            [speed for _, speed in points],
            marker="o",
            label=tree,
        )
    axes.set_xlabel("layers in DRAM, %")
    axes.set_ylabel("decode tokens/s (measured)")
    if mine:
        axes.legend(fontsize=8)
