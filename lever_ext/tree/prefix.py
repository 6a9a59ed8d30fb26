"""The best prefix of one order of the candidates (paper 2a).

Best-first order by reach makes every prefix the best tree of its size, so a scan over all prefixes
is exact where cost depends on the node count only. It also does not stop at the edge of a shape
bucket, as the paper's greedy does. A worked example, with 20 us of drafting and a pass of 60 us for
1 to 4 nodes and 90 us for 5 to 8:

    candidate   reach   prefix   gain   cycle us   gain / us
    the         (root)  1        1.00    80        .0125
    cat         .70     2        1.70    80        .0213
    sat         .42     3        2.12    80        .0265
    on          .30     4        2.42    80        .0303  <- best
    ran         .21     5        2.63   110        .0239  (edge of the bucket)
    dog         .20     6        2.83   110        .0257

A greedy that stops where the next node lowers the ratio stops at 4 as well. With a reach of .95 for
every node it would still stop there, at .0481, although 8 nodes reach .0695.

Costs that depend on leaves or on the experts read get further orders, which put chains first.
"""

from __future__ import annotations

import heapq

import numpy as np

from lever_ext.tree.candidate_set import CandidateSet, Selection, cycle_us
from lever_ext.tree.cost import CycleCost


def best_prefix(
    candidates: CandidateSet,
    cost: CycleCost,
    spent_us: float,
    max_nodes: int,
    leaf_weight: float = 1.0,
    by_union: bool = False,
) -> Selection:
    """The best prefix of one order of the nodes.

    Args:
        candidates: the candidate set.
        cost: of the cycle.
        spent_us: drafting time already spent.
        max_nodes: nodes that a pass may have.
        leaf_weight: how much a node that opens a branch counts, against one that prolongs a chain;
            1 is best-first by reach.
        by_union: order by reach over what a node adds to the time of the pass, expert reads
            included.
    """
    if leaf_weight == 1 and not by_union:
        return _best_by_reach(candidates, cost, spent_us, max_nodes)
    tree = _GrowingTree(candidates, cost, spent_us, leaf_weight)
    if by_union:
        whole = cost.verify(max_nodes, max_nodes)
        tree.node_us = max(1e-9, (whole - cost.verify(1, 1)) / max_nodes)
        tree.by_union = True
    return tree.grow(max_nodes)


def _best_by_reach(
    candidates: CandidateSet,
    cost: CycleCost,
    spent_us: float,
    max_nodes: int,
) -> Selection:
    """The best prefix by reach alone, all sizes at once.

    A parent is reached no less often than its children, so every prefix is a tree.
    """
    reach = np.asarray(candidates.reach)
    by_reach = 1 + np.argsort(-reach[1:], kind="stable")
    order = np.concatenate([[0], by_reach])[:max_nodes]
    # A parent's first child takes its place as a leaf; every further child is one more leaf.
    parents = np.asarray(candidates.parents)[order]
    is_branch = np.ones(len(order), dtype=bool)
    first_children = np.unique(parents, return_index=True)[1]
    is_branch[first_children] = False
    leaves = 1 + np.cumsum(is_branch)
    gain = 1.0 + np.cumsum(np.where(order == 0, 0.0, reach[order]))
    drafted = [candidates.drafted[node] for node in order.tolist()]
    read_us = cost.union.prefixes(drafted)
    fixed_us = cost.fixed_us + spent_us
    value = cost.worth(gain, read_us + cost.verify_prefixes(leaves) + fixed_us)
    best = int(np.argmax(value))
    return Selection(tuple(order[: best + 1].tolist()), float(value[best]))


class _GrowingTree:
    """A tree that takes the candidate of the highest rank again and again.

    Args:
        candidates: the candidate set.
        cost: of the cycle.
        spent_us: drafting time already spent.
        leaf_weight: see `best_prefix`.
    """

    def __init__(
        self,
        candidates: CandidateSet,
        cost: CycleCost,
        spent_us: float,
        leaf_weight: float,
    ) -> None:
        self.by_union = False
        self.node_us = 1.0
        """Of a pass, for each node: what expert reads are added to."""
        self._candidates = candidates
        self._children = candidates.children()
        self._cost = cost
        self._spent_us = spent_us
        self._leaf_weight = leaf_weight
        self._union = cost.union.start()
        self._union_us = self._union.add(candidates.drafted[0])
        self._nodes = [0]
        self._inner: set[int] = set()
        """Nodes with a child in the tree."""
        self._leaves = 1
        self._gain = 1.0
        self._heap: list[tuple[float, int, int]] = []
        """(-rank, size of the tree when it was ranked, node)."""

    def grow(self, max_nodes: int) -> Selection:
        """Grow to so many nodes; the best tree on the way. Mutates."""
        best = Selection((0,), self._value())
        self._push_children(0)
        while self._heap and len(self._nodes) < max_nodes:
            _, age, node = heapq.heappop(self._heap)
            if self._is_outdated(age, node):
                self._push(node)
                continue
            self._take(node)
            value = self._value()
            if value > best.value:
                best = Selection(tuple(self._nodes), value)
            self._push_children(node)
        return best

    def _is_outdated(self, age: int, node: int) -> bool:
        """Whether another node now ranks higher.

        Ranks fall when a sibling is taken and rise when experts are shared.
        """
        ranks_change = self._leaf_weight < 1 or self.by_union
        if not ranks_change or age == len(self._nodes) or not self._heap:
            return False
        return -self._rank(node) > self._heap[0][0]

    def _rank(self, node: int) -> float:
        parent = self._candidates.parents[node]
        weight = self._leaf_weight if parent in self._inner else 1.0
        added = 0.0
        if self.by_union:
            drafted = self._candidates.drafted[node]
            added = self._union.peek(drafted) - self._union_us
        reach = self._candidates.reach[node]
        return weight * reach / (self.node_us + max(0.0, added))

    def _push(self, node: int) -> None:
        heapq.heappush(self._heap, (-self._rank(node), len(self._nodes), node))

    def _push_children(self, node: int) -> None:
        for child in self._children[node]:
            self._push(child)

    def _take(self, node: int) -> None:
        parent = self._candidates.parents[node]
        self._leaves += parent in self._inner
        self._inner.add(parent)
        self._nodes.append(node)
        self._gain += self._candidates.reach[node]
        self._union_us = self._union.add(self._candidates.drafted[node])

    def _value(self) -> float:
        us = cycle_us(
            self._cost,
            nodes=len(self._nodes),
            leaves=self._leaves,
            union_us=self._union_us,
            spent_us=self._spent_us,
        )
        return float(self._cost.worth(self._gain, us))
