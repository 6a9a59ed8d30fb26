"""Whether an early exit is worthwhile: what it drops and loses, measured; what it saves, predicted.

What a pass with fewer nodes saves is predicted by the cost model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lever_ext.tree.cost import CycleCost
from lever_ext.tree.token_tree import TokenTree

KEPT, LOST = 0.48, 0.05
"""Share of nodes that stay after an early exit, and of tokens that it loses, until measured (paper,
evaluation).
"""
LEAST = 4
"""Passes in which the exit is only judged before it may be used."""
EVERY = 16
"""One pass of so many is judged only: what a used exit loses cannot be seen."""


@dataclass
class ExitRates:
    """Moving averages over trees that the exit was asked about.

    Args:
        step: weight of a new tree.
    """

    kept: float = KEPT
    """Share of nodes that stay."""
    lost: float = LOST
    """Share of a cycle's tokens that dropped nodes cost it."""
    judged: int = 0
    """Passes in which the exit was judged and not used."""
    step: float = 0.1
    _since: int = 0
    """Passes since the last judged one."""

    @property
    def due(self) -> bool:
        """Whether the exit shall be judged in this pass, and not used."""
        return self.judged < LEAST or self._since + 1 >= EVERY

    def skip(self) -> None:
        """A pass went by without judging. Mutates."""
        self._since += 1

    def observe(self, kept: float, lost: float | None) -> None:
        """Add a tree.

        Args:
            kept: share of its nodes that stayed, or would have.
            lost: share of the cycle's tokens; None where the exit was used.

        Mutates: the averages.
        """
        self.kept += self._weight() * (kept - self.kept)
        if lost is None:
            self.skip()
            return
        self.lost += self._weight() * (lost - self.lost)
        self.judged += 1
        self._since = 0

    def _weight(self) -> float:
        """The first trees count more than the paper's figures."""
        return max(self.step, 1 / (self.judged + 2))


def lost_share(path: Sequence[int], kept: Sequence[int] | None) -> float:
    """Share of a cycle's tokens, the bonus token included, that would be missing.

    Args:
        path: accepted nodes from the root on.
        kept: nodes that would have stayed; None for all.
    """
    if kept is None:
        return 0.0
    staying = set(kept)
    reached = 0
    for node in path:
        if node not in staying:
            break
        reached += 1
    return (len(path) - reached) / len(path)


def is_worthwhile(tree: TokenTree, cost: CycleCost, rates: ExitRates, after: float) -> bool:
    """Whether fewer nodes in the layers after the exit save more than the lost tokens cost.

    Args:
        tree: of the pass.
        cost: of a cycle.
        rates: of the exit.
        after: share of the layers that come after the exit.
    """
    nodes = len(tree)
    fewer = max(1, round(rates.kept * nodes))
    fewer_leaves = max(1, round(rates.kept * tree.leaves))
    read_us = cost.union.prefixes(tree.drafted)
    whole = cost.verify(nodes, tree.leaves) + float(read_us[-1])
    small = cost.verify(fewer, fewer_leaves) + float(read_us[fewer - 1])
    saved = (whole - small) * after
    return saved > rates.lost * (whole + cost.draft_us(1))
