"""How far predictions of later layers can be trusted: measured while the model runs."""

from __future__ import annotations

from collections.abc import Sequence

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
HEAVY = 3
"""Rows from which on it no longer matters for how many an expert is predicted."""
BORROWED = 4.0
"""Weight, in predictions, of all kinds of a distance in the estimate for one kind."""

Kind = tuple[int, int, bool, bool, int]
"""Predictions that are equally likely to come true.

- distance
- votes: how often the expert was predicted for the same call from further away
- many: whether the call has many tokens
- offloaded: whether the expert was
- grade: calls of one token, whether it is in the half that the router put first; of a few rows,
  for how many rows it was predicted
"""


class Confidence:
    """Share of predicted experts that their layer then needed, by kind of prediction.

    Each part of a `Kind` is there for a reason. Agreement (votes) tells true predictions from
    chance ones. What is resident is there because it is needed often, so predicting it is easier.
    The router's first choices come true more often than its last, and what is predicted for several
    rows is needed if one of them comes true. Predictions for calls of one
    token are not trusted before such ones were checked, so bad ones cost nothing but their making.
    """

    def __init__(self) -> None:
        self._pairs: dict[Kind, _Pair] = {}
        self._wide: dict[tuple[int, bool, bool], _Evidence] = {}
        self._open: dict[int, dict[int, list[_Pair]]] = {}
        """Layer -> expert -> evidence for each of its predictions."""

    def of(self, kind: Kind) -> float:
        """Probability that an expert predicted in this way will be needed."""
        own, wide = self._pair(kind)
        return _share(own, wide, many=kind[2])

    def predicted(
        self,
        layer: int,
        distance: int,
        routed: Sequence[Routed],
        many: bool,
        offloaded_only: bool = False,
        few: bool = False,
    ) -> dict[int, float]:
        """Remember a prediction until its layer runs.

        Args:
            routed: of one token, the router's first choice first.
            many, few: as in `Step`.
            offloaded_only: pass over the experts that have a slot.

        Returns:
            Expert -> probability of being needed.
        """
        known = self._open.get(layer)
        if known is None:
            known = self._open[layer] = {}
        found = {}
        leading = 0 if many or few else (len(routed) + 1) // 2
        # Most predictions are of few kinds: each kind's share is computed once.
        shares: dict[tuple[int, bool, int], tuple[_Pair, float]] = {}
        for place, (expert, load, ready_us) in enumerate(routed):
            if offloaded_only and ready_us != OFFLOADED:
                continue
            pairs = known.get(expert)
            if pairs is None:
                pairs = known[expert] = []
            grade = 1 + min(load, HEAVY) if few else int(place < leading)
            kind = len(pairs), ready_us == OFFLOADED, grade
            share = shares.get(kind)
            if share is None:
                votes, offloaded, _ = kind
                pair = self._pair((distance, votes, many, offloaded, grade))
                share = shares[kind] = pair, _share(*pair, many)
            pairs.append(share[0])
            found[expert] = share[1]
        return found

    def check(self, layer: int, routed: Sequence[Routed]) -> None:
        """The layer runs: compare what was predicted for it with what it needs."""
        known = self._open.pop(layer, None)
        if not known:
            return
        needed = {item.expert for item in routed}
        for expert, pairs in known.items():
            hit = 1.0 if expert in needed else 0.0
            for own, wide in pairs:
                own.hits = own.hits * KEEP + hit
                own.checked = own.checked * KEEP + 1.0
                wide.hits = wide.hits * KEEP + hit
                wide.checked = wide.checked * KEEP + 1.0

    def forget(self) -> None:
        """Drop the predictions that no layer has answered yet."""
        self._open.clear()

    def _pair(self, kind: Kind) -> _Pair:
        pair = self._pairs.get(kind)
        if pair is None:
            distance, _, many, offloaded, _ = kind
            wide = self._wide.setdefault((distance, many, offloaded), _Evidence())
            pair = self._pairs[kind] = _Evidence(), wide
        return pair


class _Evidence:
    """Predictions of one kind that came true, and all of them, older ones faded."""

    __slots__ = ("checked", "hits")

    def __init__(self) -> None:
        self.hits = self.checked = 0.0


_Pair = tuple[_Evidence, _Evidence]
"""Evidence of one kind, and of all kinds that share its distance, `many` and `offloaded`."""


def _share(own: _Evidence, wide: _Evidence, many: bool) -> float:
    hits = PROMPT_HITS if many else 0.0
    share = (wide.hits + hits) / (wide.checked + DOUBT)
    return (own.hits + BORROWED * share) / (own.checked + BORROWED)
