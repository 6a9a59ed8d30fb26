"""How far predictions of later layers can be trusted: measured while they are made."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from hybrimoe_plugin.core import OFFLOADED, Routed

KEEP = 0.999
"""Share of the evidence kept from one checked prediction to the next: a memory of about a thousand predictions."""
DOUBT = 6.0
"""Imagined failures with which each distance starts (successes and failures by halves in calls of many tokens, which
need most experts whatever is predicted): trust has to be earned."""
BORROWED = 4.0
"""Weight, in predictions, of all kinds of a distance in the estimate for one kind."""

Kind = tuple[int, int, bool, bool]
"""Distance, votes, many tokens, offloaded."""
ANY = -1
"""In place of the votes: all kinds of a distance together."""


class Confidence:
    """Share of predicted experts that their layer then needed, by kind of prediction.

    A kind is the distance; the votes, how often the expert was predicted for the same call from further away, since
    agreement tells true predictions from chance ones; whether the call has many tokens; and whether the expert was
    offloaded: what is there is there because it is needed often, so predicting it is easier. Predictions for calls of
    one token are not trusted before such ones were checked, so bad ones cost nothing but their making.
    """

    def __init__(self) -> None:
        self._hits: dict[Kind, float] = {}
        self._checked: dict[Kind, float] = {}
        self._open: dict[int, dict[int, list[Kind]]] = {}

    def of(self, kind: Kind) -> float:
        """Probability that an expert predicted in this way will be needed."""
        distance, _, many, offloaded = kind
        wide = distance, ANY, many, offloaded
        hits, checked = self._hits.get(wide, 0.0), self._checked.get(wide, 0.0)
        share = (hits + (0.5 * DOUBT if many else 0.0)) / (checked + DOUBT)
        return (self._hits.get(kind, 0.0) + BORROWED * share) / (self._checked.get(kind, 0.0) + BORROWED)

    def predicted(self, layer: int, distance: int, routed: Iterable[Routed], many: bool) -> dict[int, float]:
        """Remember a prediction until its layer runs; gives each expert's probability of being needed."""
        known = self._open.setdefault(layer, {})
        found = {}
        for item in routed:
            kinds = known.setdefault(item.expert, [])
            kind = distance, len(kinds), many, item.ready_us == OFFLOADED
            kinds.append(kind)
            found[item.expert] = self.of(kind)
        return found

    def check(self, layer: int, needed: Collection[int]) -> None:
        """The layer runs: compare what was predicted for it with what it needs."""
        for expert, kinds in self._open.pop(layer, {}).items():
            hit = 1.0 if expert in needed else 0.0
            for kind in kinds:
                for key in (kind, (kind[0], ANY, *kind[2:])):
                    self._hits[key] = self._hits.get(key, 0.0) * KEEP + hit
                    self._checked[key] = self._checked.get(key, 0.0) * KEEP + 1.0
