"""The cache that no run can have: it knows the rest of the trace."""

from __future__ import annotations

import numpy as np

from hybrimoe_plugin.policy.cache.ranked import Ids, RankedCache, Ranks
from hybrimoe_plugin.policy.step import Scored
from hybrimoe_plugin.replay.trace import Call, Trace

FEWER = 0.01
"""Steps by which an expert counts as needed later if only few of a step's rows need it."""


class BeladyCache(RankedCache):
    """Evicts what is needed latest and admits nothing that is needed later than its victim.

    An expert that its layer needs again in n steps ranks 1 / n, so the next step's experts rank 1
    in every layer. A step is a token, or all rows of a call that has some of several conversations
    or of a draft's tree: such a call needs the experts of all its rows at once. Of those, the ones
    that more rows need rank a little higher.
    """

    name = "belady"
    probabilities = True

    def __init__(self, trace: Trace) -> None:
        layers, experts = trace.header.layers, trace.header.experts
        super().__init__(layers, experts)
        self._next: list[list[Ranks]] = [[] for _ in range(layers)]
        """For each layer, the ranks after each of its tokens; rows of one step have the same."""
        self._token = [0] * layers
        """Tokens of each layer so far."""
        # The trace is read backwards: `left` counts each layer's steps from the end, `later` holds
        # that count at each expert's next use, a little less where few rows need it.
        left = np.zeros(layers)
        later = np.full((layers, experts), np.inf)
        for call in reversed(trace.calls):
            layer = call.layer
            for chosen in _steps(call):
                ranks = _nearness(left[layer], later[layer])
                self._next[layer] += [ranks] * len(chosen)
                left[layer] += 1
                needed, loads = np.unique(chosen, return_counts=True)
                later[layer, needed] = left[layer] - FEWER * (1.0 - loads / len(chosen))
        for layer in range(layers):
            self._next[layer].reverse()
            self.ranks[layer] = _nearness(left[layer], later[layer])

    def observe(self, layer: int, scored: Scored) -> None:
        """Go on to what comes after this call."""
        self._token[layer] += len(scored.ids)
        last = self._token[layer] - 1
        self.ranks[layer] = self._next[layer][last]


def _steps(call: Call) -> list[Ids]:
    """[R, K] ids of each step of a call, last step first."""
    if call.rows is not None:
        return [call.ids]
    return [call.ids[row : row + 1] for row in reversed(range(len(call.ids)))]


def _nearness(left: float, later: Ranks) -> Ranks:
    """1 / steps until the next use, 0 for never.

    Args:
        left: steps from now to the end of the trace.
        later: [E] the same count at each expert's next use; infinite for never.
    """
    known = later < np.inf
    count = np.where(known, later, 0.0)
    steps = left - count + 1.0
    return np.where(known, 1.0 / steps, 0.0)
