"""What nobody can know in a run: the cache that sees the rest of the trace."""

from __future__ import annotations

import numpy as np

from hybrimoe_plugin.policy.ranked import Ids, RankedCache, Scores
from hybrimoe_plugin.replay.trace import Trace


class BeladyCache(RankedCache):
    """Evicts what is needed latest and admits nothing that is needed later than its victim.

    An expert that its layer needs again in n tokens ranks 1 / n, so the next token's experts rank 1 in every layer.
    """

    name = "belady"
    probabilities = True

    def __init__(self, trace: Trace) -> None:
        header = trace.header
        super().__init__(header.layers, header.experts)
        self._next: list[list[np.ndarray]] = [[] for _ in range(header.layers)]
        self._call = [0] * header.layers
        later = np.full((header.layers, header.experts), np.inf)
        left = np.zeros(header.layers)
        # Backwards, so that `later` always holds the count of tokens left at each expert's next use.
        for call in reversed(trace.calls):
            layer = call.layer
            self._next[layer].append(1.0 / np.maximum(left[layer] - later[layer] + 1.0, 1.0) * (later[layer] < np.inf))
            for row in call.ids[::-1]:
                left[layer] += 1
                later[layer, row] = left[layer]
        for layer, steps in enumerate(self._next):
            steps.reverse()
            first = 1.0 / np.maximum(left[layer] - later[layer] + 1.0, 1.0)
            self.ranks[layer] = np.where(later[layer] < np.inf, first, 0.0)

    def observe(self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None) -> None:
        """Go on to what comes after this call."""
        self.ranks[layer] = self._next[layer][self._call[layer]]
        self._call[layer] += 1
