"""The default cache policy: the chance that an expert is needed by its layer's next token, learned
as the run goes.

A few features of an expert's past (decayed frequencies, age of its last use, router scores) are
weighed by a ridge regression that all layers share and that forgets slowly. No fixed rule is best
everywhere: recency wins where routing follows the topic closely, frequency where it is flat, scores
where they drift slowly. The regression finds out which. Ranks are probabilities, so they compare
across layers, with a prefetch's confidence, and with costs in microseconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.policy.ranked import Ids, RankedCache, Scores

DECAYS = np.array([0.07, 0.15, 0.3])
"""Steps of the decayed frequencies: memories of about 14, 7 and 3 tokens; longer ones lose where
the text moves on.
"""
AGES = (2.0, 20.0)
"""Features `1 / (offset + tokens since the last use)`."""
SCORE_STEP = 0.3
"""Step of the decayed router score; where the host shows no scores, the chosen experts' weights
stand in for them.
"""
FEATURES = len(DECAYS) + len(AGES) + 2
START = np.array([1.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0])
"""Weights before anything is learned: slow frequency and a bonus for recent use, the best fixed
rule on real traces.
"""
PRIOR = 20.0
"""How much `START` counts, in sums of squared features; a token or two of evidence outweighs it."""
FORGET = 0.98
"""Share of the evidence that is kept from one token to the next."""
STEPWISE = 32
"""Tokens of a call that are learned one by one; those before them only move the features."""
NEVER = 1e9
"""Age of an expert that was not used yet."""


class AdaptiveCache(RankedCache):
    """Ranks are estimated probabilities of use at the layer's next token.

    Args:
        top_k: scales router scores, so that their sum is the number of experts chosen.
        popularity: [L, E] shares of earlier text to start from, each row summing to 1.
    """

    name = "adaptive"
    probabilities = True

    def __init__(
        self, layers: int, experts: int, top_k: int, popularity: NDArray[np.float64] | None = None
    ) -> None:
        super().__init__(layers, experts, popularity)
        self.weights = START.copy()
        self._top_k = top_k
        self._features = np.zeros((layers, FEATURES, experts))
        self._seen = np.zeros(layers, dtype=np.int64)
        self._last = np.full((layers, experts), -NEVER)
        self._moments = np.zeros((FEATURES, FEATURES))
        self._targets = np.zeros(FEATURES)
        if popularity is not None:
            self._features[:, : len(DECAYS)] = popularity[:, None] * top_k
            self.ranks = np.tensordot(self.weights, self._features, (0, 1))

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        """Learn from what was predicted for these tokens, then predict the next one. Mutates."""
        early = max(0, len(topk_ids) - STEPWISE)
        if early:
            self._skip(layer, topk_ids[:early])
        for token in range(early, len(topk_ids)):
            ids = topk_ids[token]
            features = self._features[layer]
            if self._seen[layer]:
                self._moments += features @ features.T
                self._targets += features[:, ids].sum(axis=1)
            self._advance(layer, ids)
            if scores is None:
                self._scored(features, topk_weights[token], ids)
            else:
                self._scored(features, scores[token])
        if layer == len(self.ranks) - 1:
            self._solve(len(topk_ids))
        self.ranks[layer] = self.weights @ self._features[layer]

    def _advance(self, layer: int, ids: NDArray[np.int64]) -> None:
        """Move one layer's frequencies and ages on by one token."""
        features, fast = self._features[layer], len(DECAYS)
        features[:fast] *= (1 - DECAYS)[:, None]
        features[:fast, ids] += DECAYS[:, None]
        self._seen[layer] += 1
        last = self._last[layer]
        last[ids] = self._seen[layer]
        age = self._seen[layer] - last
        for row, offset in enumerate(AGES, fast):
            np.divide(1.0, age + offset, out=features[row])

    def _scored(
        self, features: NDArray[np.float64], scores: Scores, ids: NDArray[np.int64] | None = None
    ) -> None:
        """Move one layer's score features on: scores of all experts, or of `ids` alone, scaled to a
        sum of top-k.
        """
        total = float(scores.sum())
        scale = self._top_k / total if total > 0.0 else 0.0
        if ids is None:
            np.multiply(scores, scale, out=features[-2])
        else:
            features[-2] = 0.0
            features[-2, ids] = scores * scale
        features[-1] += SCORE_STEP * (features[-2] - features[-1])

    def _skip(self, layer: int, ids: Ids) -> None:
        """Move frequencies and ages over many tokens at once; `ids` [T, K]."""
        tokens, width = ids.shape
        features, experts = self._features[layer], self.ranks.shape[1]
        for row, step in enumerate(DECAYS):
            fade = step * (1 - step) ** np.arange(tokens - 1, -1, -1, dtype=np.float64)
            added = np.bincount(ids.ravel(), weights=np.repeat(fade, width), minlength=experts)
            features[row] = features[row] * (1 - step) ** tokens + added
        # Of an expert chosen by several tokens the last one counts: later assignments win.
        self._last[layer][ids.ravel()] = np.repeat(self._seen[layer] + 1 + np.arange(tokens), width)
        self._seen[layer] += tokens

    def _solve(self, tokens: int) -> None:
        """Once a pass, after its last layer: new weights from all evidence so far."""
        prior = PRIOR * np.eye(FEATURES)
        self.weights = np.linalg.solve(self._moments + prior, self._targets + PRIOR * START)
        keep = FORGET ** min(tokens, STEPWISE)
        self._moments *= keep
        self._targets *= keep
