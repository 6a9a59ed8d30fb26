"""Which rows of a tree to keep, given what a middle layer says about each edge: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybrimoe_plugin.errors import ConfigError
from lever_ext.tree.token_tree import TokenTree


@dataclass(frozen=True)
class PruneSettings:
    """When an edge is dropped, and when a whole pruning is.

    Raises:
        ConfigError: naming field, value and allowed range.
    """

    threshold: float = 0.02
    """Edges with a lower probability are dropped ..."""
    near_root: float = 0.5
    """... but at the root the threshold counts only this share, growing to all of it at depth
    `full_depth`.
    """
    full_depth: int = 3
    least_rows: int = 3
    """A pruning that leaves fewer rows is rejected."""
    least_leaves: int = 1
    least_saved: float = 0.1
    """A pruning that drops a smaller share of the rows is not worth compacting for."""

    def __post_init__(self) -> None:
        for name in ("threshold", "near_root", "least_saved"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected 0 to 1, found {getattr(self, name)!r}")
        for name in ("full_depth", "least_rows", "least_leaves"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)!r}")


def kept_rows(tree: TokenTree, edges: Sequence[float], settings: PruneSettings) -> list[int] | None:
    """The rows that stay, ascending; None where pruning is not worth it or would leave too little.

    Args:
        tree: the tree under verification.
        edges: for each row, the probability of its token given its parent; the root's is not used.
        settings: thresholds and safeguards.
    """
    depths = tree.depths
    kept = {0}
    for row in range(1, len(tree)):
        share = min(1.0, float(depths[row] - 1) / settings.full_depth)
        threshold = settings.threshold * (settings.near_root + (1 - settings.near_root) * share)
        if tree.parents[row] in kept and edges[row] >= threshold:
            kept.add(row)
    for row in _backbone(tree, edges):
        kept.update(tree.path(row))
    rows = sorted(kept)
    if len(rows) > (1 - settings.least_saved) * len(tree) or len(rows) < settings.least_rows:
        return None
    return rows if tree.subset(rows).leaves >= settings.least_leaves else None


def _backbone(tree: TokenTree, edges: Sequence[float]) -> list[int]:
    """From the root, the likeliest child again and again."""
    rows = [0]
    while tree.children[rows[-1]]:
        rows.append(max(tree.children[rows[-1]].values(), key=lambda row: (edges[row], -row)))
    return rows
