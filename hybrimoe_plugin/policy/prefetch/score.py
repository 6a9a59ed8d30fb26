"""Prefetching by the router's scores alone."""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_plugin.core import OFFLOADED, ExpertRef
from hybrimoe_plugin.policy.prefetch.prediction import Prediction, PrefetchRequest


class ScorePrefetcher:
    """Nearest layer first, heaviest predicted load first; the plain twin of `ImpactPrefetcher`."""

    calibrated = False

    def choose(
        self, predictions: Sequence[Prediction], room: int, floor: float = 0.0
    ) -> list[PrefetchRequest]:
        candidates: list[tuple[int, int, ExpertRef]] = []
        for prediction in predictions:
            for item in prediction.routed:
                if item.ready_us == OFFLOADED:
                    ref = ExpertRef(prediction.layer, item.expert)
                    candidates.append((prediction.distance, -item.load, ref))
        candidates.sort()
        return [PrefetchRequest(ref, distance, 0.0, 1.0) for distance, _, ref in candidates[:room]]
