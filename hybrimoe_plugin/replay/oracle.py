"""The cache that no run can have: it knows the rest of the trace."""

from __future__ import annotations

import numpy as np

from hybrimoe_plugin.policy.cache.ranked import Ids, RankedCache, Ranks, Scores
from hybrimoe_plugin.replay.trace import Trace


class BeladyCache(RankedCache):
    """Evicts what is needed latest and admits nothing that is needed later than its victim.

    An expert that its layer needs again in n tokens ranks 1 / n, so the next token's experts rank 1
    in every layer.
    """

    name = "belady"
    probabilities = True

    def __init__(self, trace: Trace) -> None:
        layers, experts = trace.header.layers, trace.header.experts
        super().__init__(layers, experts)
        self._next: list[list[Ranks]] = [[] for _ in range(layers)]
        """For each layer, the ranks after each of its tokens."""
        self._token = [0] * layers
        """Tokens of each layer so far."""
        # The trace is read backwards: `left` counts each layer's tokens from the end, and `later`
        # holds that count at each expert's next use.
        left = np.zeros(layers)
        later = np.full((layers, experts), np.inf)
        for call in reversed(trace.calls):
            layer = call.layer
            for chosen in call.ids[::-1]:
                ranks = _nearness(left[layer], later[layer])
                self._next[layer].append(ranks)
                left[layer] += 1
                later[layer, chosen] = left[layer]
        for layer in range(layers):
            self._next[layer].reverse()
            self.ranks[layer] = _nearness(left[layer], later[layer])

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        """Go on to what comes after this call."""
        self._token[layer] += len(topk_ids)
        last = self._token[layer] - 1
        self.ranks[layer] = self._next[layer][last]


def _nearness(left: float, later: Ranks) -> Ranks:
    """1 / tokens until the next use, 0 for never.

    Args:
        left: tokens from now to the end of the trace.
        later: [E] the same count at each expert's next use; infinite for never.
    """
    known = later < np.inf
    count = np.where(known, later, 0.0)
    tokens = left - count + 1.0
    return np.where(known, 1.0 / tokens, 0.0)
