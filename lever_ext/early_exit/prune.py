"""Which nodes of a tree to keep, given what a middle layer says about each edge: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybrimoe_plugin.errors import ConfigError
from lever_ext.tree.token_tree import TokenTree


@dataclass(frozen=True)
class PruneSettings:
    """When an edge is dropped, and when a whole pruning is rejected.

    Raises:
        ConfigError: naming field, value and allowed range.
    """

    threshold: float = 0.02
    """Edges with a lower probability are dropped ..."""
    near_root: float = 0.5
    """... but at the root only this share of the threshold counts, growing to all of it at depth
    `full_depth`.
    """
    full_depth: int = 3
    least_nodes: int = 3
    """A pruning that leaves fewer nodes is rejected."""
    least_leaves: int = 1
    """The same for leaves."""
    least_saved: float = 0.1
    """A pruning that drops a smaller share of the nodes is not worth compacting for."""

    def __post_init__(self) -> None:
        for name in ("threshold", "near_root", "least_saved"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}: expected 0 to 1, found {value!r}")
        for name in ("full_depth", "least_nodes", "least_leaves"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, found {value!r}")


def kept_nodes(
    tree: TokenTree,
    edges: Sequence[float],
    settings: PruneSettings,
) -> list[int] | None:
    """The nodes that stay, ascending.

    Args:
        tree: the tree under verification.
        edges: for each node, the probability of its token given its parent; the root's is not used.
        settings: thresholds and safeguards.

    Returns:
        None where pruning is not worth it or would leave too little.
    """
    kept = {0}
    for node in range(1, len(tree)):
        depth = float(tree.depths[node])
        if tree.parents[node] in kept and edges[node] >= _threshold(depth, settings):
            kept.add(node)
    # The likeliest path stays whatever its edges say.
    kept.update(_likeliest_path(tree, edges))
    nodes = sorted(kept)
    most = (1 - settings.least_saved) * len(tree)
    if len(nodes) > most or len(nodes) < settings.least_nodes:
        return None
    if tree.subset(nodes).leaves < settings.least_leaves:
        return None
    return nodes


def _threshold(depth: float, settings: PruneSettings) -> float:
    """The least probability of an edge to a node at this depth."""
    way = min(1.0, (depth - 1) / settings.full_depth)
    share = settings.near_root + (1 - settings.near_root) * way
    return settings.threshold * share


def _likeliest_path(tree: TokenTree, edges: Sequence[float]) -> list[int]:
    """From the root, the likeliest child again and again."""
    nodes = [0]
    while tree.children[nodes[-1]]:
        children = tree.children[nodes[-1]].values()
        likeliest = max(children, key=lambda node: (edges[node], -node))
        nodes.append(likeliest)
    return nodes
