"""Cache policies with fixed rules: recency, frequency, both, and none."""

from __future__ import annotations

import numpy as np

from hybrimoe_plugin.policy.cache.ranked import RankedCache, Ranks, fading
from hybrimoe_plugin.policy.cache.row_shares import row_shares
from hybrimoe_plugin.policy.step import Scored

EMA_STEP = 0.1
"""Share of the newest token in `EMACache`: a memory of about 10 tokens."""


class LRUCache(RankedCache):
    """Least recently used: rank is the number of the last step that chose the expert.

    A step is a token, or a call of a few rows.
    """

    name = "lru"

    def __init__(self, layers: int, experts: int, popularity: Ranks | None = None) -> None:
        super().__init__(layers, experts, popularity)
        self._steps = np.zeros(layers, dtype=np.int64)

    def observe(self, layer: int, scored: Scored) -> None:
        ranks = self.ranks[layer]
        steps = scored.ids[None] if scored.few else scored.ids[-ranks.size :]
        for chosen in steps:
            self._steps[layer] += 1
            ranks[chosen] = self._steps[layer]

    def prefers(self, newcomer: float, victim: float) -> bool:
        """Always: LRU has no admission rule."""
        return True


class LFUCache(RankedCache):
    """Least frequently used: rank is the number of tokens that chose the expert."""

    name = "lfu"

    def observe(self, layer: int, scored: Scored) -> None:
        np.add.at(self.ranks[layer], scored.ids.ravel(), 1.0)


class EMACache(RankedCache):
    """Decayed frequency: rank is the share of recent tokens that chose the expert.

    Of a call of a few rows, their share is one step.
    """

    name = "ema"

    def observe(self, layer: int, scored: Scored) -> None:
        ids, rows = scored.ids, scored.rows if scored.few else None
        steps = len(ids) if rows is None else 1
        shares = fading(EMA_STEP, steps) if rows is None else row_shares(rows)
        shares = EMA_STEP * shares
        ranks = self.ranks[layer]
        ranks *= (1 - EMA_STEP) ** steps
        np.add.at(ranks, ids, shares[:, None])


class StaticCache(RankedCache):
    """What was loaded first stays (kTransformers)."""

    name = "static"

    def observe(self, layer: int, scored: Scored) -> None:
        """Nothing to learn."""

    def prefers(self, newcomer: float, victim: float) -> bool:
        return False
