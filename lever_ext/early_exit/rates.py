"""Whether an early exit pays: what it drops and what it loses, measured; what that saves, by the
cost model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lever_ext.tree.cost import CycleCost
from lever_ext.tree.token_tree import TokenTree

KEPT, LOST = 0.48, 0.05
"""Rows that stay after an early exit, and tokens that are lost by it, until measured (paper,
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
    """Share of rows that stay."""
    lost: float = LOST
    """Share of a cycle's tokens that dropped rows cost it."""
    judged: int = 0
    step: float = 0.1
    _since: int = 0

    @property
    def due(self) -> bool:
        """Whether the exit shall be judged in this pass, and not used."""
        return self.judged < LEAST or self._since + 1 >= EVERY

    def skip(self) -> None:
        """A pass went by without judging. Mutates."""
        self._since += 1

    def observe(self, kept: float, lost: float | None) -> None:
        """Add a tree. Mutates.

        Args:
            lost: None where the exit was used.
        """
        self.kept += self._weight() * (kept - self.kept)
        if lost is None:
            self.skip()
            return
        self.lost += self._weight() * (lost - self.lost)
        self.judged, self._since = self.judged + 1, 0

    def _weight(self) -> float:
        """The first trees count more than the paper's figures."""
        return max(self.step, 1 / (self.judged + 2))


def lost_share(path: Sequence[int], kept: Sequence[int] | None) -> float:
    """Share of a cycle's tokens, the target's own one included, that would be missing.

    Args:
        path: accepted rows from the root on.
        kept: rows that would have stayed; None for all.
    """
    if kept is None:
        return 0.0
    staying = set(kept)
    reached = next((place for place, row in enumerate(path) if row not in staying), len(path))
    return (len(path) - reached) / len(path)


def pays(tree: TokenTree, cost: CycleCost, rates: ExitRates, after: float) -> bool:
    """Whether fewer rows in the layers after the exit save more of a cycle than lost tokens cost.

    Args:
        after: share of the layers that come after the exit.
    """
    rows, leaves = len(tree), tree.leaves
    fewer = max(1, round(rates.kept * rows))
    reads = cost.union.prefixes(tree.drafted)
    whole = cost.verify(rows, leaves) + float(reads[-1])
    small = cost.verify(fewer, max(1, round(rates.kept * leaves))) + float(reads[fewer - 1])
    return (whole - small) * after > rates.lost * (whole + cost.draft_us(1))
