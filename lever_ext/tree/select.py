"""Choose the subtree of known candidates with the most expected tokens per microsecond (paper 2a).

Best-first order by reach makes every prefix the best tree of its size, so a scan over all prefixes
is exact where cost depends on the node count only, and does not stop at the edge of a shape bucket
as the paper's greedy does. Costs that depend on leaves or on the experts read get further orders,
which put chains first, and a local search.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lever_ext.tree.cost import CycleCost, Drafted, NoUnion

LEAF_WEIGHTS = (1.0, 0.5, 0.2)
"""How much a node that opens a branch counts in an order, against one that prolongs a chain."""


MOVES = 12
"""Removals that a step of the local search looks at; twice as many additions."""


LARGE = 48
"""Rows of a tree that no single move betters by as much as looking for it costs (15 ms at 120
rows).
"""


class Known(NamedTuple):
    """Candidates as rows, parents first, the root in row 0."""

    parents: Sequence[int] | NDArray[np.int64]
    reach: Sequence[float] | NDArray[np.float64]
    drafted: Sequence[Drafted]

    def listed(self) -> Known:
        """The same in plain numbers, which are faster one at a time."""
        return Known(
            np.asarray(self.parents).tolist(), np.asarray(self.reach).tolist(), self.drafted
        )


class Selection(NamedTuple):
    """A subtree and what it is worth."""

    rows: tuple[int, ...]
    """Rows of `Known`, the root first, parents before children."""
    value: float
    """Of the cycle, as `CycleCost.worth` has it."""


def tree_value(known: Known, rows: Sequence[int], cost: CycleCost, spent_us: float) -> float:
    """Worth of a subtree; `spent_us` is drafting time already spent."""
    inner = {known.parents[row] for row in rows if row}
    union = cost.union.start()
    union_us = 0.0
    for row in rows:
        union_us = union.add(known.drafted[row])
    gain = 1.0 + sum(known.reach[row] for row in rows if row)
    return float(cost.worth(gain, _us(cost, len(rows), len(rows) - len(inner), union_us, spent_us)))


def best_prefix(
    known: Known,
    cost: CycleCost,
    spent_us: float,
    max_rows: int,
    leaf_weight: float = 1.0,
    by_union: bool = False,
) -> Selection:
    """The best prefix of one order of the nodes.

    Args:
        known: the candidates.
        cost: of the cycle.
        spent_us: drafting time already spent.
        max_rows: rows that a pass may have.
        leaf_weight: see `LEAF_WEIGHTS`; 1 is best-first by reach.
        by_union: order by reach over what a node adds to the time of the pass, expert reads
            included.
    """
    if leaf_weight == 1 and not by_union:
        return _best_by_reach(known, cost, spent_us, max_rows)
    children = _children(known)
    union = cost.union.start()
    union_us = union.add(known.drafted[0])
    row_us = (
        max(1e-9, (cost.verify(max_rows, max_rows) - cost.verify(1, 1)) / max_rows)
        if by_union
        else 1.0
    )
    grown = [0]
    has_child: set[int] = set()
    leaves, gain = 1, 1.0
    best = Selection((0,), float(cost.worth(1.0, _us(cost, 1, 1, union_us, spent_us))))
    heap: list[tuple[float, int, int]] = []

    def rank(row: int) -> float:
        weight = leaf_weight if known.parents[row] in has_child else 1.0
        added = union.peek(known.drafted[row]) - union_us if by_union else 0.0
        return weight * known.reach[row] / (row_us + max(0.0, added))

    def push(row: int) -> None:
        heapq.heappush(heap, (-rank(row), len(grown), row))

    for child in children[0]:
        push(child)
    while heap and len(grown) < max_rows:
        _, age, row = heapq.heappop(heap)
        # Ranks fall when a sibling is taken and rise when experts are shared: look again before
        # taking.
        if (leaf_weight < 1 or by_union) and age < len(grown) and heap and -rank(row) > heap[0][0]:
            push(row)
            continue
        parent = known.parents[row]
        leaves += parent in has_child
        has_child.add(parent)
        grown.append(row)
        gain += known.reach[row]
        union_us = union.add(known.drafted[row])
        value = float(cost.worth(gain, _us(cost, len(grown), leaves, union_us, spent_us)))
        if value > best.value:
            best = Selection(tuple(grown), value)
        for child in children[row]:
            push(child)
    return best


def _best_by_reach(known: Known, cost: CycleCost, spent_us: float, max_rows: int) -> Selection:
    """The best prefix by reach alone, all sizes at once; a parent is reached no less often than its
    children.
    """
    reach = np.asarray(known.reach)
    order = np.concatenate([[0], 1 + np.argsort(-reach[1:], kind="stable")])[:max_rows]
    parents = np.asarray(known.parents)[order]
    # A parent's first child takes its place as a leaf.
    branches = np.ones(len(order), dtype=bool)
    branches[np.unique(parents, return_index=True)[1]] = False
    leaves = 1 + np.cumsum(branches)
    gain = 1.0 + np.cumsum(np.where(order == 0, 0.0, reach[order]))
    us = cost.union.prefixes([known.drafted[row] for row in order.tolist()])
    value = cost.worth(gain, us + cost.verify_prefixes(leaves) + (cost.fixed_us + spent_us))
    size = int(np.argmax(value)) + 1
    return Selection(tuple(order[:size].tolist()), float(value[size - 1]))


def best_subtree(known: Known, cost: CycleCost, spent_us: float, max_rows: int) -> Selection:
    """The best of all orders, small trees improved by local search.

    At least the exact best prefix; the exact optimum where cost depends on the node count only.
    """
    known = known.listed()
    dense, by_leaves = isinstance(cost.union, NoUnion), _leaves_matter(cost, max_rows)
    weights = LEAF_WEIGHTS if by_leaves else LEAF_WEIGHTS[:1]
    starts = [best_prefix(known, cost, spent_us, max_rows, weight) for weight in weights]
    if not dense:
        starts.append(best_prefix(known, cost, spent_us, max_rows, 1.0, by_union=True))
    best = max(starts, key=lambda found: found.value)
    if not dense or not by_leaves or len(best.rows) > LARGE:
        return best
    starts = sorted(set(starts), key=lambda found: -found.value)[:2]
    improved = (improve(known, start, cost, spent_us, max_rows) for start in starts)
    return max(improved, key=lambda found: found.value)


def improve(
    known: Known, start: Selection, cost: CycleCost, spent_us: float, max_rows: int
) -> Selection:
    """Hill climbing by adding a node or a chain, removing a leaf or a chain, or both at once."""
    children = _children(known)
    best = start
    while True:
        chosen = set(best.rows)
        additions: list[tuple[int, ...]] = [()]
        for row in range(1, len(known.parents)):
            if row not in chosen and known.parents[row] in chosen:
                additions += _chains(known, children, row)
        additions.sort(key=lambda rows: -sum(known.reach[row] for row in rows) / max(1, len(rows)))
        removals = sorted(
            _removable(known, best.rows), key=lambda rows: known.reach[rows[-1]] / len(rows)
        )
        better = best
        for removed in [(), *removals[:MOVES]]:
            for added in additions[: 2 * MOVES]:
                if len(chosen) + len(added) - len(removed) > max_rows or any(
                    known.parents[row] in removed for row in added
                ):
                    continue
                rows = tuple(sorted((chosen - set(removed)) | set(added)))
                value = tree_value(known, rows, cost, spent_us)
                if value > better.value + 1e-9 * abs(better.value):
                    better = Selection(rows, value)
        if better is best:
            return best
        best = better


def _us(cost: CycleCost, rows: int, leaves: int, union_us: float, spent_us: float) -> float:
    return cost.fixed_us + spent_us + cost.verify(rows, leaves) + union_us


def _children(known: Known) -> list[list[int]]:
    children: list[list[int]] = [[] for _ in known.parents]
    for row, parent in enumerate(known.parents[1:], start=1):
        children[parent].append(row)
    return children


def _leaves_matter(cost: CycleCost, max_rows: int) -> bool:
    sizes = {size for size in (2, max_rows // 2, max_rows) if 2 <= size <= max_rows}
    return any(
        abs(cost.verify(n, 1) - cost.verify(n, n - 1)) > 1e-6 * cost.verify(n, 1) for n in sizes
    )


def _chains(known: Known, children: list[list[int]], row: int) -> list[tuple[int, ...]]:
    """The node alone, and with its likeliest descendants, up to 8 deep."""
    chain = [row]
    found: list[tuple[int, ...]] = [(row,)]
    while children[chain[-1]] and len(chain) < 8:
        chain.append(max(children[chain[-1]], key=lambda child: known.reach[child]))
        found.append(tuple(chain))
    return found


def _removable(known: Known, rows: Sequence[int]) -> list[tuple[int, ...]]:
    """Each leaf, alone and with its ancestors up to the next branch."""
    count: dict[int, int] = {}
    for row in rows:
        if row:
            count[known.parents[row]] = count.get(known.parents[row], 0) + 1
    found: list[tuple[int, ...]] = []
    for row in rows:
        if row and row not in count:
            chain = [row]
            found.append((row,))
            while known.parents[chain[-1]] and count[known.parents[chain[-1]]] == 1:
                chain.append(known.parents[chain[-1]])
                found.append(tuple(chain))
    return found
