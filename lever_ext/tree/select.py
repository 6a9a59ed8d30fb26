"""Choose the subtree of the candidates with the most expected tokens per microsecond (paper 2a).

At first the best prefixes of several orders, see `lever_ext.tree.prefix`. Small trees are then
improved by local search: nodes and chains are added and removed while that is worth it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lever_ext.tree.candidate_set import CandidateSet, Selection, tree_value
from lever_ext.tree.cost import CycleCost
from lever_ext.tree.expert_union import NoUnion
from lever_ext.tree.prefix import best_prefix

LEAF_WEIGHTS = (1.0, 0.5, 0.2)
"""How much a node that opens a branch counts in an order, against one that prolongs a chain."""
LARGE = 48
"""Nodes of a tree that no single move improves by as much as the search costs (15 ms at 120)."""
STARTS = 2
"""Prefixes that local search begins with."""
MOVES = 12
"""Removals that a step of the search looks at; twice as many additions."""
LONGEST_CHAIN = 8
"""Nodes of a chain that is added in one move, at most."""
LEAST_GAIN = 1e-9
"""Share of a tree's value that a move must add."""

Nodes = tuple[int, ...]


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


def improve(
    candidates: CandidateSet,
    start: Selection,
    cost: CycleCost,
    spent_us: float,
    max_nodes: int,
) -> Selection:
    """Hill climbing by adding a node or a chain, removing a leaf or a chain, or both at once.

    Args:
        candidates: the candidate set, as plain numbers.
        start: the subtree to begin with.
        cost: of the cycle.
        spent_us: drafting time already spent.
        max_nodes: nodes that a pass may have.
    """
    children = candidates.children()
    best = start
    while True:
        better = best
        for nodes in _neighbours(candidates, children, best, max_nodes):
            value = tree_value(candidates, nodes, cost, spent_us)
            if value > better.value + LEAST_GAIN * abs(better.value):
                better = Selection(nodes, value)
        if better is best:
            return best
        best = better


def _neighbours(
    candidates: CandidateSet,
    children: list[list[int]],
    tree: Selection,
    max_nodes: int,
) -> Iterator[Nodes]:
    """The trees that are one move away, the most promising moves first."""
    chosen = set(tree.nodes)
    additions = _additions(candidates, children, chosen)[: 2 * MOVES]
    removals = _removals(candidates, tree.nodes)[:MOVES]
    for removed in [(), *removals]:
        for added in additions:
            too_large = len(chosen) + len(added) - len(removed) > max_nodes
            orphaned = any(candidates.parents[node] in removed for node in added)
            if too_large or orphaned:
                continue
            nodes = (chosen - set(removed)) | set(added)
            yield tuple(sorted(nodes))


def _additions(
    candidates: CandidateSet,
    children: list[list[int]],
    chosen: set[int],
) -> list[Nodes]:
    """Nothing, and every node or chain that can be added, the likeliest nodes first."""
    found: list[Nodes] = [()]
    for node in range(1, len(candidates.parents)):
        if node not in chosen and candidates.parents[node] in chosen:
            found += _chains(candidates, children, node)

    def mean_reach(nodes: Nodes) -> float:
        return sum(candidates.reach[node] for node in nodes) / max(1, len(nodes))

    return sorted(found, key=lambda nodes: -mean_reach(nodes))


def _chains(
    candidates: CandidateSet,
    children: list[list[int]],
    node: int,
) -> list[Nodes]:
    """The node alone, and with its likeliest descendants, up to `LONGEST_CHAIN` deep."""
    chain = [node]
    found: list[Nodes] = [(node,)]
    while children[chain[-1]] and len(chain) < LONGEST_CHAIN:
        below = children[chain[-1]]
        likeliest = max(below, key=lambda child: candidates.reach[child])
        chain.append(likeliest)
        found.append(tuple(chain))
    return found


def _removals(candidates: CandidateSet, nodes: Sequence[int]) -> list[Nodes]:
    """Each leaf, alone and with its ancestors up to the next branch, the least likely first."""
    parents = candidates.parents
    count: dict[int, int] = {}
    for node in nodes:
        if node:
            count[parents[node]] = count.get(parents[node], 0) + 1
    found: list[Nodes] = []
    for node in nodes:
        if not node or node in count:
            continue
        chain = [node]
        found.append((node,))
        while parents[chain[-1]] and count[parents[chain[-1]]] == 1:
            chain.append(parents[chain[-1]])
            found.append(tuple(chain))

    return sorted(found, key=lambda chain: candidates.reach[chain[-1]] / len(chain))
