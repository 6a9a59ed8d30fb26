"""The candidate set of a tree, and what a subtree of it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lever_ext.tree.cost import CycleCost
from lever_ext.tree.token_tree import DraftedToken


class CandidateSet(NamedTuple):
    """Nodes that a tree may be made of, numbered from the root (0), parents before children."""

    parents: Sequence[int] | NDArray[np.int64]
    """Number of each node's parent; -1 for the root."""
    reach: Sequence[float] | NDArray[np.float64]
    drafted: Sequence[DraftedToken]

    def listed(self) -> CandidateSet:
        """The same in plain numbers, which are faster one at a time."""
        return CandidateSet(
            parents=np.asarray(self.parents).tolist(),
            reach=np.asarray(self.reach).tolist(),
            drafted=self.drafted,
        )

    def children(self) -> list[list[int]]:
        """The numbers of each node's children."""
        found: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            found[parent].append(node)
        return found


class Selection(NamedTuple):
    """A subtree and what it is worth."""

    nodes: tuple[int, ...]
    """Numbers in the candidate set, the root first, parents before children."""
    value: float
    """Of the cycle, see `CycleCost.worth`."""


def tree_value(
    candidates: CandidateSet,
    nodes: Sequence[int],
    cost: CycleCost,
    spent_us: float,
) -> float:
    """What a subtree is worth.

    Args:
        candidates: the candidate set.
        nodes: of the subtree, the root among them.
        cost: of the cycle.
        spent_us: drafting time already spent.
    """
    union = cost.union.start()
    union_us = 0.0
    for node in nodes:
        union_us = union.add(candidates.drafted[node])
    below_root = [node for node in nodes if node]
    gain = 1.0 + sum(candidates.reach[node] for node in below_root)
    inner = {candidates.parents[node] for node in below_root}
    leaves = len(nodes) - len(inner)
    us = cycle_us(cost, len(nodes), leaves, union_us, spent_us)
    return float(cost.worth(gain, us))


def cycle_us(
    cost: CycleCost,
    nodes: int,
    leaves: int,
    union_us: float,
    spent_us: float,
) -> float:
    """Predicted microseconds of a cycle with a tree of this shape.

    Args:
        union_us: of its expert reads.
        spent_us: of its drafting.
    """
    return cost.fixed_us + spent_us + cost.verify(nodes, leaves) + union_us
