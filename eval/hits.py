"""Hit rates of a cache alone: every miss may be taken in, nothing costs time, nobody looks
ahead.
"""

from __future__ import annotations

import numpy as np

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.cache.ranked import CachePolicy
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
    each = max(1, round(ratio * header.experts))
    cached = Cached(policy, each, shared)
    hits = needed = 0
    for call in trace.calls:
        experts = np.unique(call.ids)
        if len(call.ids) == 1:
            hits += int(cached.here[call.layer, experts].sum())
            needed += len(experts)
        # Token by token, as a cache that follows the prompt would.
        for token in range(len(call.ids)):
            row = slice(token, token + 1)
            scores = None if call.scores is None else call.scores[row]
            policy.observe(call.layer, call.ids[row], call.weights[row], scores)
            cached.take(call.layer, call.ids[token])
    return hits / needed


class Cached:
    """Which experts are cached: those that the policy prefers."""

    def __init__(self, policy: CachePolicy, each: int, shared: bool) -> None:
        self._policy = policy
        self._each = each
        self._shared = shared
        self.here = np.zeros(policy.ranks.shape, dtype=bool)
        self._worth = np.full(policy.ranks.shape, np.inf)

    def take(self, layer: int, experts: np.ndarray) -> None:
        """Admit what a token needed, best first, each against the least worthy of those that are
        there.
        """
        ranks, here, worth = self._policy.ranks[layer], self.here[layer], self._worth
        worth[layer] = np.where(here, ranks, np.inf)
        room = self._each * (len(self.here) if self._shared else 1)
        held = int(self.here.sum() if self._shared else here.sum())
        rows = slice(None) if self._shared else slice(layer, layer + 1)
        for expert in sorted(experts[~here[experts]].tolist(), key=lambda e: -ranks[e]):
            if held >= room:
                row, victim = divmod(int(worth[rows].argmin()), here.size)
                row += 0 if self._shared else layer
                if not self._policy.prefers(float(ranks[expert]), float(worth[row, victim])):
                    continue
                self.here[row, victim] = False
                worth[row, victim] = np.inf
            else:
                held += 1
            here[expert] = True
            worth[layer, expert] = ranks[expert]
