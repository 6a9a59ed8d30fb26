"""How far predictions of later layers can be trusted: measured while they are made."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from hybrimoe_plugin.core import OFFLOADED, Routed

KEEP = 0.999
"""Share of the evidence kept from one checked prediction to the next: a memory of about a thousand predictions."""
ENOUGH = 24.0
"""Predicted experts that must have been checked at a distance before it is trusted at all."""


class Confidence:
    """Share of predicted experts that their layer then needed, for each distance; one token and many apart.

    Experts that were offloaded when they were predicted are counted apart from those that were there: what is there is
    there because it is needed often, so predicting it is easier. Nothing is trusted before it was checked, so bad
    predictions cost nothing but their making.
    """

    def __init__(self) -> None:
        self._hits: dict[tuple[int, bool, bool], float] = {}
        self._checked: dict[tuple[int, bool, bool], float] = {}
        self._open: dict[int, list[tuple[int, bool, list[int]]]] = {}

    def of(self, distance: int, many: bool, offloaded: bool = True) -> float:
        """Probability that an expert predicted over this distance will be needed; 0 while unknown."""
        key = distance, many, offloaded
        checked = self._checked.get(key, 0.0)
        return self._hits[key] / checked if checked >= ENOUGH else 0.0

    def predicted(self, layer: int, distance: int, routed: Iterable[Routed]) -> None:
        """Remember a prediction until its layer runs."""
        away: list[int] = []
        there: list[int] = []
        for item in routed:
            (away if item.ready_us == OFFLOADED else there).append(item.expert)
        self._open.setdefault(layer, []).extend(((distance, True, away), (distance, False, there)))

    def check(self, layer: int, needed: Collection[int], many: bool) -> None:
        """The layer runs: compare what was predicted for it with what it needs."""
        for distance, offloaded, experts in self._open.pop(layer, ()):
            if experts:
                key, keep = (distance, many, offloaded), KEEP ** len(experts)
                hits = sum(1 for expert in experts if expert in needed)
                self._hits[key] = self._hits.get(key, 0.0) * keep + hits
                self._checked[key] = self._checked.get(key, 0.0) * keep + len(experts)
