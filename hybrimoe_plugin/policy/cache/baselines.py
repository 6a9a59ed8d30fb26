"""Cache policies with fixed rules: recency, frequency, both, and none."""

from __future__ import annotations

import numpy as np

from hybrimoe_plugin.policy.cache.ranked import Ids, RankedCache, Ranks, Scores, fading

EMA_STEP = 0.1
"""Share of the newest token in `EMACache`: a memory of about 10 tokens."""


class LRUCache(RankedCache):
    """Least recently used: rank is the number of the last token that chose the expert."""

    name = "lru"

    def __init__(self, layers: int, experts: int, popularity: Ranks | None = None) -> None:
        super().__init__(layers, experts, popularity)
        self._tokens = np.zeros(layers, dtype=np.int64)

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        ranks = self.ranks[layer]
        for chosen in topk_ids[-ranks.size :]:
            self._tokens[layer] += 1
            ranks[chosen] = self._tokens[layer]

    def prefers(self, newcomer: float, victim: float) -> bool:
        """Always: LRU has no admission rule."""
        return True


class LFUCache(RankedCache):
    """Least frequently used: rank is the number of tokens that chose the expert."""

    name = "lfu"

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        np.add.at(self.ranks[layer], topk_ids.ravel(), 1.0)


class EMACache(RankedCache):
    """Decayed frequency: rank is the share of recent tokens that chose the expert."""

    name = "ema"

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        tokens = len(topk_ids)
        shares = EMA_STEP * fading(EMA_STEP, tokens)
        ranks = self.ranks[layer]
        ranks *= (1 - EMA_STEP) ** tokens
        np.add.at(ranks, topk_ids, shares[:, None])


class StaticCache(RankedCache):
    """What was loaded first stays (kTransformers)."""

    name = "static"

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        """Nothing to learn."""

    def prefers(self, newcomer: float, victim: float) -> bool:
        return False
