"""Expert cache policies: which experts of a layer are worth a slot. Each layer is ranked on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.config import CACHES, Settings
from hybrimoe_plugin.errors import ConfigError

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]


class CachePolicy(Protocol):
    """Ranks experts by what the router did so far. Layers are positions among the MoE layers."""

    name: str

    def observe(self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None) -> None:
        """Learn from one layer call: ids and weights [T, K], scores [T, E] where the host shows them. Mutates."""
        ...

    def victim(self, layer: int, candidates: Sequence[int]) -> int:
        """The candidate to evict first; candidates are never empty. Deterministic."""
        ...

    def admits(self, layer: int, expert: int, victim: int) -> bool:
        """Whether a newcomer may take the victim's slot."""
        ...

    def initial(self, layer: int, count: int) -> list[int]:
        """The experts to load before the first call."""
        ...


class RankedCache:
    """A cache that keeps one number per expert and evicts the lowest; the base of all that follow.

    A newcomer is admitted if it ranks at least as high as the victim.
    """

    name = ""

    def __init__(self, layers: int, experts: int) -> None:
        self.ranks = np.zeros((layers, experts), dtype=np.float64)

    def observe(self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None) -> None:
        """Learn from one layer call; each policy has its own rule. Mutates `ranks`."""
        raise AssertionError("a policy without a rule")

    def victim(self, layer: int, candidates: Sequence[int]) -> int:
        ranks = self.ranks[layer]
        return min(candidates, key=lambda expert: (ranks[expert], expert))

    def admits(self, layer: int, expert: int, victim: int) -> bool:
        return bool(self.ranks[layer, expert] >= self.ranks[layer, victim])

    def initial(self, layer: int, count: int) -> list[int]:
        return list(range(min(count, self.ranks.shape[1])))


class MRSCache(RankedCache):
    """Minus recent score: `S <- alpha * TopP(s) + (1 - alpha) * S` for every token of a call, in order.

    TopP keeps the `p` highest scores of a token and counts the others as 0. Without full scores the routing weights of
    the chosen experts stand in for them. Source: paper section 4.4.
    """

    name = "mrs"

    def __init__(self, layers: int, experts: int, alpha: float, p: int) -> None:
        super().__init__(layers, experts)
        self.alpha = alpha
        self.p = min(p, experts)
        # A token's share of S fades as (1 - alpha)^age: beyond this age it is below float noise.
        self._horizon = 1 if alpha >= 1 else 1_000_000 if alpha <= 0 else int(np.ceil(np.log(1e-9) / np.log1p(-alpha)))

    def observe(self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None) -> None:
        ranks = self.ranks[layer]
        tokens = len(topk_ids)
        if tokens == 1:
            ids, values = (topk_ids[0], topk_weights[0]) if scores is None else self._top_p(scores[0])
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

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self._tokens = np.zeros(layers, dtype=np.int64)

    def observe(self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None) -> None:
        ranks = self.ranks[layer]
        for row in topk_ids[-ranks.size :]:
            self._tokens[layer] += 1
            ranks[row] = self._tokens[layer]

    def admits(self, layer: int, expert: int, victim: int) -> bool:
        """Always: LRU has no admission rule."""
        return True


class LFUCache(RankedCache):
    """Least frequently used: rank is the number of tokens that chose the expert."""

    name = "lfu"

    def observe(self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None) -> None:
        np.add.at(self.ranks[layer], topk_ids.ravel(), 1.0)


class StaticCache(RankedCache):
    """What was loaded first stays (kTransformers)."""

    name = "static"

    def observe(self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None) -> None:
        """Nothing to learn."""

    def admits(self, layer: int, expert: int, victim: int) -> bool:
        return False


def make_cache(name: str, layers: int, experts: int, top_k: int, settings: Settings) -> CachePolicy:
    """The cache policy of that name.

    Raises:
        ConfigError: unknown name.
    """
    if name == "mrs":
        return MRSCache(layers, experts, settings.mrs_alpha, settings.mrs_p or 2 * top_k)
    kinds = {"lru": LRUCache, "lfu": LFUCache, "static": StaticCache}
    if name not in kinds:
        raise ConfigError(f"cache: expected one of {', '.join(CACHES)}, found {name!r}")
    cache: CachePolicy = kinds[name](layers, experts)
    return cache
