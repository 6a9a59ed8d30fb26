"""Hit rates of a cache alone: every miss may be admitted, and nothing is prefetched."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.cache.ranked import CachePolicy
from hybrimoe_plugin.policy.step import Scored
from hybrimoe_plugin.replay.oracle import BeladyCache
from hybrimoe_plugin.replay.trace import Trace

POLICIES = ("lru", "lfu", "ema", "mrs", "adaptive", "belady")


def hit_rate(trace: Trace, name: str, ratio: float, shared: bool) -> float:
    """Share of the experts needed in decode that were cached when their call began.

    Args:
        shared: all layers share their slots; else each has an equal part.
    """
    header = trace.header
    policy: CachePolicy
    if name == "belady":
        policy = BeladyCache(trace)
    else:
        policy = make_cache(name, header.layers, header.experts, header.top_k, Settings())
    per_layer = max(1, round(ratio * header.experts))
    cached = Cached(policy, per_layer, shared)
    hits = needed = 0
    for call in trace.calls:
        layer = call.layer
        if len(call.ids) == 1:
            experts = np.unique(call.ids)
            hits += int(cached.here[layer, experts].sum())
            needed += len(experts)
        # Token by token, as a cache that follows the prompt would.
        for token, ids in enumerate(call.ids):
            row = slice(token, token + 1)
            scores = None if call.scores is None else call.scores[row]
            policy.observe(layer, Scored(call.ids[row], call.weights[row], scores))
            cached.admit(layer, ids)
    return hits / needed


class Cached:
    """Which experts are cached: those that the policy prefers.

    Args:
        per_layer: slots for each layer.
        shared: whether all layers share their slots.
    """

    def __init__(self, policy: CachePolicy, per_layer: int, shared: bool) -> None:
        self._policy = policy
        self._shared = shared
        shape = policy.ranks.shape
        self._room = per_layer
        if shared:
            self._room *= shape[0]
        self.here = np.zeros(shape, dtype=bool)
        """[L, E]: what is cached."""
        self._worth = np.full(shape, np.inf)
        """[L, E]: ranks of what is cached, as of its layer's last call; else infinite."""

    def admit(self, layer: int, experts: NDArray[np.int64]) -> None:
        """Admit what a token needed, best first, each against the least worthy cached expert."""
        ranks = self._policy.ranks[layer]
        here = self.here[layer]
        self._worth[layer] = np.where(here, ranks, np.inf)
        missing = experts[~here[experts]].tolist()
        missing.sort(key=lambda expert: -ranks[expert])
        for expert in missing:
            rank = float(ranks[expert])
            if self._has_room(layer) or self._evict_for(layer, rank):
                here[expert] = True
                self._worth[layer, expert] = rank

    def _has_room(self, layer: int) -> bool:
        counted = self.here if self._shared else self.here[layer]
        return int(counted.sum()) < self._room

    def _evict_for(self, layer: int, rank: float) -> bool:
        """Evict the least worthy expert that may be evicted for a newcomer.

        Args:
            layer: the newcomer's; without shared slots only its experts may be evicted.
            rank: the newcomer's.

        Returns:
            False if the policy prefers the least worthy expert, which stays then.
        """
        first = 0 if self._shared else layer
        rows = self._worth if self._shared else self._worth[layer : layer + 1]
        row, victim = divmod(int(rows.argmin()), rows.shape[1])
        row += first
        if not self._policy.prefers(rank, float(self._worth[row, victim])):
            return False
        self.here[row, victim] = False
        self._worth[row, victim] = np.inf
        return True
