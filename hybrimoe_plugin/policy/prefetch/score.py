"""Prefetching by the router's scores alone."""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_plugin.core import OFFLOADED, ExpertRef
from hybrimoe_plugin.policy.prefetch.prediction import Prediction, PrefetchRequest


class ScorePrefetcher:
    """Nearest layer first, heaviest predicted load first; the plain twin of `ImpactPrefetcher`.

    Nothing is simulated, so requests carry no impact.
    """

    calibrated = False

    def choose(
        self, predictions: Sequence[Prediction], room: int, floor: float = 0.0
    ) -> list[PrefetchRequest]:
        candidates: list[tuple[int, int, ExpertRef]] = []
        for prediction in predictions:
            distance, layer = prediction.distance, prediction.layer
            for item in prediction.routed:
                if item.ready_us == OFFLOADED:
                    ref = ExpertRef(layer, item.expert)
                    candidates.append((distance, -item.load, ref))
        candidates.sort()
        chosen = []
        for distance, _, ref in candidates[:room]:
            chosen.append(PrefetchRequest(ref, distance, impact_us=0.0, confidence=1.0))
        return chosen
