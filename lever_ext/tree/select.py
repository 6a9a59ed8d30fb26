"""Choose the subtree of the candidates with the most expected tokens per microsecond (paper 2a).

At first the best prefixes of several orders, see `lever_ext.tree.prefix`; small trees are then
improved by local search, see `lever_ext.tree.improve`.
"""

from __future__ import annotations

from lever_ext.tree.candidate_set import CandidateSet, Selection
from lever_ext.tree.cost import CycleCost
from lever_ext.tree.expert_union import NoUnion
from lever_ext.tree.improve import improve
from lever_ext.tree.prefix import best_prefix

LEAF_WEIGHTS = (1.0, 0.5, 0.2)
"""How much a node that opens a branch counts in an order, against one that prolongs a chain."""
LARGE = 48
"""Nodes of a tree that no single move improves by as much as the search costs (15 ms at 120)."""
STARTS = 2
"""Prefixes that local search begins with."""


def best_subtree(
    candidates: CandidateSet,
    cost: CycleCost,
    spent_us: float,
    max_nodes: int,
) -> Selection:
    """The best prefix of all orders, small trees improved by local search.

    At least the exact best prefix; the exact optimum where cost depends on the node count only.

    Args:
        candidates: the candidate set.
        cost: of the cycle.
        spent_us: drafting time already spent.
        max_nodes: nodes that a pass may have.
    """
    candidates = candidates.listed()
    dense = isinstance(cost.union, NoUnion)
    by_leaves = _leaves_matter(cost, max_nodes)
    weights = LEAF_WEIGHTS if by_leaves else LEAF_WEIGHTS[:1]
    starts = [best_prefix(candidates, cost, spent_us, max_nodes, weight) for weight in weights]
    if not dense:
        starts.append(best_prefix(candidates, cost, spent_us, max_nodes, by_union=True))
    best = max(starts, key=_value)
    if not dense or not by_leaves or len(best.nodes) > LARGE:
        return best
    distinct = sorted(set(starts), key=_value, reverse=True)
    improved = [
        improve(candidates, start, cost, spent_us, max_nodes) for start in distinct[:STARTS]
    ]
    return max(improved, key=_value)


def _value(selection: Selection) -> float:
    return selection.value


def _leaves_matter(cost: CycleCost, max_nodes: int) -> bool:
    """Whether a pass over a chain and one over a star of as many nodes differ in time."""
    sizes = {2, max_nodes // 2, max_nodes}
    for size in sizes:
        if not 2 <= size <= max_nodes:
            continue
        chain_us = cost.verify(size, 1)
        star_us = cost.verify(size, size - 1)
        if abs(chain_us - star_us) > 1e-6 * chain_us:
            return True
    return False
