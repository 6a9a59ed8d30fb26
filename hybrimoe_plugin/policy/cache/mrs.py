"""The cache policy of the paper: minus recent score (MRS)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.policy.cache.ranked import Ids, RankedCache, Ranks, Scores, fading
from hybrimoe_plugin.policy.step import Scored

NOISE = 1e-9
"""Share of a score that no longer matters: below the precision of the float32 scores."""
UNLIMITED = 1_000_000
"""Tokens that are looked at where older ones never fade (`alpha` 0)."""


class MRSCache(RankedCache):
    """Minus recent score: `S <- alpha * TopP(s) + (1 - alpha) * S` for each token of a call.

    TopP keeps the `p` highest scores of a token and counts the others as 0. Without full scores the
    routing weights of the chosen experts stand in for them. A call of a few rows is one step, with
    the mean over its rows. Source: paper section 4.4.

    Args:
        alpha: weight of the newest token, 0 to 1.
        p: scores of a token that are kept.
        popularity: [L, E] ranks to start with.
    """

    name = "mrs"

    def __init__(
        self, layers: int, experts: int, alpha: float, p: int, popularity: Ranks | None = None
    ) -> None:
        super().__init__(layers, experts, popularity)
        self.alpha = alpha
        self.p = min(p, experts)
        self._horizon = _horizon(alpha)

    def observe(self, layer: int, scored: Scored) -> None:
        ids, weights, scores, _ = scored
        tokens = len(ids)
        if tokens == 1:
            self._observe_token(layer, ids, weights, scores)
        elif scored.few:
            self._observe_many(layer, ids, weights, scores, np.full(tokens, 1.0 / tokens), 1)
        else:
            first = max(0, tokens - self._horizon)
            fade = fading(self.alpha, tokens - first)
            shown = None if scores is None else scores[first:]
            self._observe_many(layer, ids[first:], weights[first:], shown, fade, tokens)

    def _observe_token(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        """One token, as in decode."""
        ids: NDArray[np.integer] = topk_ids[0]
        values = topk_weights[0]
        if scores is not None:
            shown = scores[0]
            order = np.argpartition(shown, -self.p)
            ids = order[-self.p :]
            values = shown[ids]
        added = self.alpha * values
        ranks = self.ranks[layer]
        ranks *= 1 - self.alpha
        ranks[ids] += added

    def _observe_many(
        self,
        layer: int,
        topk_ids: Ids,
        topk_weights: Scores,
        scores: Scores | None,
        counted: Ranks,
        steps: int,
    ) -> None:
        """Several rows at once.

        Args:
            counted: [T] how much each row counts, of a step of its own.
            steps: how many the call is.
        """
        ids: NDArray[np.integer] = topk_ids
        values = topk_weights
        if scores is not None:
            order = np.argpartition(scores, -self.p, axis=1)
            ids = order[:, -self.p :]
            values = np.take_along_axis(scores, ids, axis=1)
        added = self.alpha * counted[:, None] * values
        ranks = self.ranks[layer]
        ranks *= (1 - self.alpha) ** steps
        np.add.at(ranks, ids, added)


def _horizon(alpha: float) -> int:
    """Tokens after which a score has faded to `NOISE`: it fades as (1 - alpha)^age."""
    if alpha >= 1:
        return 1
    if alpha <= 0:
        return UNLIMITED
    tokens = np.log(NOISE) / np.log1p(-alpha)
    return int(np.ceil(tokens))
