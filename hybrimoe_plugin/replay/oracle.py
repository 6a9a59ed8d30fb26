"""What nobody can know in a run: the cache that sees the rest of the trace."""

from __future__ import annotations

import numpy as np

from hybrimoe_plugin.policy.cache.ranked import Ids, RankedCache, Scores
from hybrimoe_plugin.replay.trace import Trace


class BeladyCache(RankedCache):
    """Evicts what is needed latest and admits nothing that is needed later than its victim.

    An expert that its layer needs again in n tokens ranks 1 / n, so the next token's experts rank 1
    in every layer.
    """

    name = "belady"
    probabilities = True

    def __init__(self, trace: Trace) -> None:
        header = trace.header
        super().__init__(header.layers, header.experts)
        self._next: list[list[np.ndarray]] = [[] for _ in range(header.layers)]
        self._token = [0] * header.layers
        later = np.full((header.layers, header.experts), np.inf)
        left = np.zeros(header.layers)
        # Backwards: `later` holds the count of tokens that were left at each expert's next use.
        for call in reversed(trace.calls):
            for row in call.ids[::-1]:
                self._next[call.layer].append(_nearness(left[call.layer], later[call.layer]))
                left[call.layer] += 1
                later[call.layer, row] = left[call.layer]
        for layer, steps in enumerate(self._next):
            steps.reverse()
            self.ranks[layer] = _nearness(left[layer], later[layer])

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        """Go on to what comes after this call."""
        self._token[layer] += len(topk_ids)
        self.ranks[layer] = self._next[layer][self._token[layer] - 1]


def _nearness(left: float, later: np.ndarray) -> np.ndarray:
    """1 / tokens until the next use, 0 for never."""
    known = later < np.inf
    return np.where(known, 1.0 / (left - np.where(known, later, 0.0) + 1.0), 0.0)
