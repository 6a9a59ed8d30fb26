"""Local search from a subtree: nodes and chains are added and removed while that is worth it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lever_ext.tree.candidate_set import CandidateSet, Selection, tree_value
from lever_ext.tree.cost import CycleCost

MOVES = 12
"""Removals that a step of the search looks at; twice as many additions."""
LONGEST_CHAIN = 8
"""Nodes of a chain that is added in one move, at most."""
LEAST_GAIN = 1e-9
"""Share of a tree's value that a move must add."""

Nodes = tuple[int, ...]


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
