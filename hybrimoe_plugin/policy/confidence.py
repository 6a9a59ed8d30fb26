"""How far predictions of later layers can be trusted: measured while they are made."""

from __future__ import annotations

from collections.abc import Collection

KEEP = 0.999
"""Share of the evidence kept from one checked prediction to the next: a memory of about a thousand predictions."""
ENOUGH = 24.0
"""Predicted experts that must have been checked at a distance before it is trusted at all."""


class Confidence:
    """Share of predicted experts that their layer then needed, for each distance; one token and many apart.

    Nothing is trusted before it was checked, so bad predictions cost nothing but their making.
    """

    def __init__(self) -> None:
        self._hits: dict[tuple[int, bool], float] = {}
        self._checked: dict[tuple[int, bool], float] = {}
        self._open: dict[int, list[tuple[int, frozenset[int]]]] = {}

    def of(self, distance: int, many: bool) -> float:
        """Probability that an expert predicted over this distance will be needed; 0 while unknown."""
        checked = self._checked.get((distance, many), 0.0)
        return self._hits[distance, many] / checked if checked >= ENOUGH else 0.0

    def predicted(self, layer: int, distance: int, experts: Collection[int]) -> None:
        """Remember a prediction until its layer runs."""
        self._open.setdefault(layer, []).append((distance, frozenset(experts)))

    def check(self, layer: int, needed: Collection[int], many: bool) -> None:
        """The layer runs: compare what was predicted for it with what it needs."""
        for distance, experts in self._open.pop(layer, ()):
            key = distance, many
            hits = sum(1 for expert in experts if expert in needed)
            self._hits[key] = self._hits.get(key, 0.0) * KEEP ** len(experts) + hits
            self._checked[key] = self._checked.get(key, 0.0) * KEEP ** len(experts) + len(experts)
