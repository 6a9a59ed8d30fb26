"""How far predictions of later layers can be trusted: measured while the model runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hybrimoe_plugin.core import OFFLOADED, Routed

KEEP = 0.999
"""Share of the evidence kept from one checked prediction to the next: a memory of about a thousand
predictions.
"""
DOUBT = 6.0
"""Imagined failures with which each distance starts: trust has to be earned."""
PROMPT_HITS = 0.5 * DOUBT
"""Those of them that count as successes in calls of many tokens, which need most experts whatever
is predicted.
"""
BORROWED = 4.0
"""Weight, in predictions, of all kinds of a distance in the estimate for one kind."""
ANY = -1
"""In place of the votes: all kinds of a distance together."""


Kind = tuple[int, int, bool, bool, bool]
"""Predictions that are equally likely to come true.

- distance
- votes: how often the expert was predicted for the same call from further away, or `ANY`
- many: whether the call has many tokens
- offloaded: whether the expert was
- leading: whether it is in the half that the router put first; calls of one token only
"""


class Confidence:
    """Share of predicted experts that their layer then needed, by kind of prediction.

    Each part of a `Kind` is there for a reason. Agreement (votes) tells true predictions from
    chance ones. What is resident is there because it is needed often, so predicting it is easier.
    The router's first choices come true more often than its last. Predictions for calls of one
    token are not trusted before such ones were checked, so bad ones cost nothing but their making.
    """

    def __init__(self) -> None:
        self._evidence: dict[Kind, _Evidence] = {}
        self._open: dict[int, dict[int, list[tuple[_Evidence, _Evidence]]]] = {}
        """Layer -> expert -> evidence for each of its predictions: its own kind's, and that of all
        of its distance.
        """

    def of(self, kind: Kind) -> float:
        """Probability that an expert predicted in this way will be needed."""
        own, wide = self._pair(kind)
        return _share(own, wide, many=kind[2])

    def predicted(
        self, layer: int, distance: int, routed: Sequence[Routed], many: bool
    ) -> dict[int, float]:
        """Remember a prediction until its layer runs.

        Args:
            routed: of one token, the router's first choice first.

        Returns:
            Expert -> probability of being needed.
        """
        known = self._open.setdefault(layer, {})
        found = {}
        for place, item in enumerate(routed):
            pairs = known.setdefault(item.expert, [])
            leading = not many and 2 * place < len(routed)
            offloaded = item.ready_us == OFFLOADED
            own, wide = pair = self._pair((distance, len(pairs), many, offloaded, leading))
            pairs.append(pair)
            found[item.expert] = _share(own, wide, many)
        return found

    def check(self, layer: int, needed: Collection[int]) -> None:
        """The layer runs: compare what was predicted for it with what it needs."""
        for expert, pairs in self._open.pop(layer, {}).items():
            hit = 1.0 if expert in needed else 0.0
            for pair in pairs:
                for evidence in pair:
                    evidence.hits = evidence.hits * KEEP + hit
                    evidence.checked = evidence.checked * KEEP + 1.0

    def forget(self) -> None:
        """Drop the predictions that no layer has answered yet."""
        self._open.clear()

    def _pair(self, kind: Kind) -> tuple[_Evidence, _Evidence]:
        """Evidence of this kind, and of all kinds of its distance."""
        evidence = self._evidence
        own = evidence.get(kind)
        if own is None:
            own = evidence[kind] = _Evidence()
        distance, _, many, offloaded, _ = kind
        every = distance, ANY, many, offloaded, False
        wide = evidence.get(every)
        if wide is None:
            wide = evidence[every] = _Evidence()
        return own, wide


class _Evidence:
    """Predictions of one kind that came true, and all of them, older ones faded."""

    __slots__ = ("checked", "hits")

    def __init__(self) -> None:
        self.hits = self.checked = 0.0


def _share(own: _Evidence, wide: _Evidence, many: bool) -> float:
    hits = PROMPT_HITS if many else 0.0
    share = (wide.hits + hits) / (wide.checked + DOUBT)
    return (own.hits + BORROWED * share) / (own.checked + BORROWED)
