"""Expert cache policies: which experts are worth a slot.

A policy ranks the experts of every layer; the controller evicts the lowest rank, of the layer or of
all layers where they share their slots. `adaptive` (the default) has a file of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.config import CACHES, Settings
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.adaptive import AdaptiveCache
from hybrimoe_plugin.policy.ranked import CachePolicy as CachePolicy
from hybrimoe_plugin.policy.ranked import Ids, RankedCache, Scores


class MRSCache(RankedCache):
    """Minus recent score: `S <- alpha * TopP(s) + (1 - alpha) * S` for every token of a call, in
    order.

    TopP keeps the `p` highest scores of a token and counts the others as 0. Without full scores the
    routing weights of the chosen experts stand in for them. Source: paper section 4.4.
    """

    name = "mrs"

    def __init__(
        self,
        layers: int,
        experts: int,
        alpha: float,
        p: int,
        popularity: NDArray[np.float64] | None = None,
    ) -> None:
        super().__init__(layers, experts, popularity)
        self.alpha = alpha
        self.p = min(p, experts)
        # A token's share of S fades as (1 - alpha)^age: beyond this age it is below float noise.
        self._horizon = (
            1
            if alpha >= 1
            else 1_000_000
            if alpha <= 0
            else int(np.ceil(np.log(1e-9) / np.log1p(-alpha)))
        )

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        ranks = self.ranks[layer]
        tokens = len(topk_ids)
        if tokens == 1:
            ids, values = (
                (topk_ids[0], topk_weights[0]) if scores is None else self._top_p(scores[0])
            )
            ranks *= 1 - self.alpha
            ranks[ids] += self.alpha * values
            return
        recent = slice(max(0, tokens - self._horizon), tokens)
        fade = (1 - self.alpha) ** np.arange(len(topk_ids[recent]) - 1, -1, -1, dtype=np.float64)
        ids, values = topk_ids[recent], topk_weights[recent]
        if scores is not None:
            ids = np.argpartition(scores[recent], -self.p, axis=1)[:, -self.p :]
            values = np.take_along_axis(scores[recent], ids, axis=1)
        ranks *= (1 - self.alpha) ** tokens
        np.add.at(ranks, ids, self.alpha * fade[:, None] * values)

    def _top_p(self, scores: Scores) -> tuple[NDArray[np.intp], Scores]:
        ids = np.argpartition(scores, -self.p)[-self.p :]
        return ids, scores[ids]


class LRUCache(RankedCache):
    """Least recently used: rank is the number of the last token that chose the expert."""

    name = "lru"

    def __init__(
        self, layers: int, experts: int, popularity: NDArray[np.float64] | None = None
    ) -> None:
        super().__init__(layers, experts, popularity)
        self._tokens = np.zeros(layers, dtype=np.int64)

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        ranks = self.ranks[layer]
        for row in topk_ids[-ranks.size :]:
            self._tokens[layer] += 1
            ranks[row] = self._tokens[layer]

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
    """Decayed frequency: rank is the share of recent tokens that chose the expert, with a memory of
    about 10 tokens.
    """

    name = "ema"
    STEP = 0.1

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        ranks, step = self.ranks[layer], self.STEP
        fade = step * (1 - step) ** np.arange(len(topk_ids) - 1, -1, -1, dtype=np.float64)
        ranks *= (1 - step) ** len(topk_ids)
        np.add.at(ranks, topk_ids, fade[:, None])


class StaticCache(RankedCache):
    """What was loaded first stays (kTransformers)."""

    name = "static"

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        """Nothing to learn."""

    def prefers(self, newcomer: float, victim: float) -> bool:
        return False


def make_cache(
    name: str,
    layers: int,
    experts: int,
    top_k: int,
    settings: Settings,
    popularity: NDArray[np.float64] | None = None,
) -> CachePolicy:
    """The cache policy of that name.

    Args:
        popularity: [L, E] shares of earlier text to start from.

    Raises:
        ConfigError: unknown name.
    """
    if name == "adaptive":
        return AdaptiveCache(layers, experts, top_k, popularity)
    if name == "mrs":
        return MRSCache(
            layers, experts, settings.mrs_alpha, settings.mrs_p or 2 * top_k, popularity
        )
    kinds: dict[str, type[RankedCache]] = {
        "lru": LRUCache,
        "lfu": LFUCache,
        "ema": EMACache,
        "static": StaticCache,
    }
    if name not in kinds:
        raise ConfigError(f"cache: expected one of {', '.join(CACHES)}, found {name!r}")
    return kinds[name](layers, experts, popularity)
