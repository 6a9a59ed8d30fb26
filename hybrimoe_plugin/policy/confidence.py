"""How far predictions of later layers can be trusted: measured while they are made."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hybrimoe_plugin.core import OFFLOADED, Routed

KEEP = 0.999
"""Share of the evidence kept from one checked prediction to the next: a memory of about a thousand
predictions.
"""
DOUBT = 6.0
"""Imagined failures with which each distance starts (successes and failures by halves in calls of
many tokens, which need most experts whatever is predicted): trust has to be earned.
"""
BORROWED = 4.0
"""Weight, in predictions, of all kinds of a distance in the estimate for one kind."""

Kind = tuple[int, int, bool, bool, bool]
"""Distance, votes, many tokens, offloaded, leading."""
ANY = -1
"""In place of the votes: all kinds of a distance together."""


class Confidence:
    """Share of predicted experts that their layer then needed, by kind of prediction.

    A kind is the distance; the votes, how often the expert was predicted for the same call from
    further away, since agreement tells true predictions from chance ones; whether the call has many
    tokens; whether the expert was offloaded: what is there is there because it is needed often, so
    predicting it is easier; and, for one token, whether it leads, as one of the half that the
    router put first. Predictions for calls of one token are not trusted before such ones were
    checked, so bad ones cost nothing but their making.
    """

    def __init__(self) -> None:
        self._evidence: dict[Kind, _Evidence] = {}
        self._open: dict[int, dict[int, list[tuple[_Evidence, _Evidence]]]] = {}
        """Layer -> expert -> evidence for each of its predictions: its own kind's, and that of all
        of its distance.
        """

    def of(self, kind: Kind) -> float:
        """Probability that an expert predicted in this way will be needed."""
        return self._share(*self._pair(kind), many=kind[2])

    def predicted(
        self, layer: int, distance: int, routed: Sequence[Routed], many: bool
    ) -> dict[int, float]:
        """Remember a prediction until its layer runs; gives each expert's probability of being
        needed.

        Args:
            routed: of one token, the router's first choice first.
        """
        known = self._open.setdefault(layer, {})
        found = {}
        for place, item in enumerate(routed):
            kinds = known.setdefault(item.expert, [])
            leading = not many and 2 * place < len(routed)
            pair = self._pair((distance, len(kinds), many, item.ready_us == OFFLOADED, leading))
            kinds.append(pair)
            found[item.expert] = self._share(*pair, many)
        return found

    def check(self, layer: int, needed: Collection[int]) -> None:
        """The layer runs: compare what was predicted for it with what it needs."""
        for expert, kinds in self._open.pop(layer, {}).items():
            hit = 1.0 if expert in needed else 0.0
            for pair in kinds:
                for evidence in pair:
                    evidence.hits = evidence.hits * KEEP + hit
                    evidence.checked = evidence.checked * KEEP + 1.0

    def forget(self) -> None:
        """Drop the predictions that no layer has answered yet."""
        self._open.clear()

    def _pair(self, kind: Kind) -> tuple[_Evidence, _Evidence]:
        own = self._evidence.get(kind)
        if own is None:
            own = self._evidence[kind] = _Evidence()
        wide_kind = kind[0], ANY, kind[2], kind[3], False
        wide = self._evidence.get(wide_kind)
        if wide is None:
            wide = self._evidence[wide_kind] = _Evidence()
        return own, wide

    @staticmethod
    def _share(own: _Evidence, wide: _Evidence, many: bool) -> float:
        share = (wide.hits + (0.5 * DOUBT if many else 0.0)) / (wide.checked + DOUBT)
        return (own.hits + BORROWED * share) / (own.checked + BORROWED)


class _Evidence:
    """Predictions of one kind that came true, and all of them, older ones faded."""

    __slots__ = ("checked", "hits")

    def __init__(self) -> None:
        self.hits = self.checked = 0.0
