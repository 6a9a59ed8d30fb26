"""The default cache policy: learns the probability that the layer's next token needs an expert.

A few features of an expert's past (decayed frequencies, age of its last use, router scores) are
weighed by a ridge regression that all layers share and that forgets slowly. No fixed rule is best
everywhere: recency wins where routing follows the topic closely, frequency where it is flat, scores
where they drift slowly. The regression finds out which. Ranks are probabilities, so they compare
across layers, with a prefetch's confidence, and with costs in microseconds.

A call of a few rows, of several conversations or of a draft's tree, is one step as a token is. An
expert is then chosen by a share of the rows instead of by all or none, and its rank is the share
that is expected to choose it in the next call.

One token changes a few hundred numbers of a layer. `one_token.c` does it in one call where it was
compiled at installation, else numpy in some fifteen, each of which takes longer to begin than to
compute.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.policy.cache.drafted import Drafted, DraftedPass
from hybrimoe_plugin.policy.cache.ranked import Ids, RankedCache, Ranks, Shares, fading
from hybrimoe_plugin.policy.cache.row_shares import row_shares
from hybrimoe_plugin.policy.step import Rows, Scored

try:
    from hybrimoe_plugin.policy.cache.one_token import learn_token_2
except ImportError:  # there was no C compiler, or it compiled other sources
    learn_token: Any = None
else:
    learn_token = learn_token_2

DECAYS = np.array([0.07, 0.15, 0.3])
"""Steps of the decayed frequencies: memories of about 14, 7 and 3 tokens; longer ones lose where
the text moves on.
"""
AGES = (2.0, 20.0)
"""Features `1 / (offset + tokens since the last use)`: one for very recent use, one for longer
ago. Chosen together with `DECAYS` and `FORGET`, leave-one-out over seven traces.
"""
NEAR = AGES[0]
"""Offset of the feature that use by a share of the rows moves by that share; the age follows."""
SCORE_STEP = 0.3
"""Step of the decayed router score; where the host shows no scores, the chosen experts' weights
stand in for them.
"""
FEATURES = len(DECAYS) + len(AGES) + 2
"""The last two are the newest router score and the decayed one."""
FREQUENCIES = len(DECAYS)
STEPS = DECAYS[:, None]
KEPT_SHARES = 1 - STEPS
OFFSETS = np.array(AGES)[:, None]
START = np.array([1.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0])
"""Weights before anything is learned: slow frequency and a bonus for recent use, the best fixed
rule on real traces.
"""
PRIOR = 20.0
"""How much `START` counts, in sums of squared features; a token or two of evidence outweighs it."""
FORGET = 0.98
"""Share of the evidence that is kept from one token to the next."""
STEPWISE = 32
"""Tokens of a call that are learned one by one; those before them only update the features."""
NEVER = 1e9
"""Age of an expert that has not been used yet."""


class AdaptiveCache(RankedCache):
    """Ranks are estimated probabilities of use at the layer's next token.

    Args:
        top_k: scales router scores, so that their sum is the number of experts chosen.
        popularity: [L, E] shares of earlier text to start from, each row summing to 1.
        native: learn from a token in one call of C where that was compiled; False for the plain
            twin.
    """

    name = "adaptive"
    probabilities = True

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        popularity: Ranks | None = None,
        native: bool = True,
    ) -> None:
        super().__init__(layers, experts, popularity)
        self.weights = START.copy()
        """[F] weights of the features."""
        self.features = np.zeros((layers, FEATURES, experts))
        """[L, F, E] each expert's past: decayed frequencies, ages, scores."""
        self._top_k = float(top_k)
        self._seen = [0.0] * layers
        """[L] tokens so far."""
        self._last = np.full((layers, experts), -NEVER)
        """[L, E] number of the last token that chose the expert."""
        self._moments = np.zeros((FEATURES, FEATURES))
        """[F, F] evidence: products of features, summed over tokens and experts."""
        self._targets = np.zeros(FEATURES)
        """[F] evidence: features of the experts that were chosen."""
        # Buffers of one token: allocating and broadcasting cost more than these few numbers do.
        self._ids = np.zeros(top_k, np.int64)
        """[K] its experts."""
        self._shown = np.zeros(experts)
        """[E] its router scores."""
        self._products = np.zeros((FEATURES, FEATURES))
        self._sums = np.zeros(FEATURES)
        self._chosen = np.zeros(experts)
        """[E] 1 for the experts of the present token; of a few rows, the shares that chose each."""
        self._added = np.zeros((len(DECAYS), experts))
        self._change = np.zeros(experts)
        if popularity is not None:
            frequencies = popularity[:, None] * top_k
            self.features[:, : len(DECAYS)] = frequencies
            self.ranks[:] = np.tensordot(self.weights, self.features, (0, 1))
        self._draft = DraftedPass()
        self._known_shares: tuple[Rows | None, Shares] = None, np.zeros(0)
        """The last call's rows and their shares."""
        self._native = native and learn_token is not None
        self._memory: Any = None
        """[L, 12] addresses for `one_token`; None until they are needed."""
        self._starts: list[int] = []
        """[L] address of each row of `_memory`."""

    def __getstate__(self) -> dict[str, Any]:
        """Without addresses: a copy has memory of its own."""
        return {**self.__dict__, "_memory": None, "_starts": []}

    def observe(self, layer: int, scored: Scored) -> None:
        """Learn from what was predicted for these tokens, then predict the next one. Mutates."""
        topk_ids, topk_weights, scores, rows = scored
        if rows is not None and scored.few:
            self._observe_rows(layer, scored, rows)
            return
        if self._draft.before is not None:
            self._draft.clear()  # what is learned now builds on it
        tokens, early = len(topk_ids), 0
        if tokens > STEPWISE:
            early = tokens - STEPWISE
            self._skip(layer, topk_ids[:early])
        learn = self._learn_natively if self._native else self._learn_token
        for token in range(early, tokens):
            ids = topk_ids[token]
            if len(ids) != len(self._ids):
                self._ids, self._memory = np.zeros(len(ids), np.int64), None
            self._ids[:] = ids
            if scores is not None:
                self._shown[:] = scores[token]
            else:
                self._shown.fill(0.0)
                self._shown[ids] = topk_weights[token]
            learn(layer)
            self._seen[layer] += 1
        if layer == len(self.ranks) - 1:
            self._solve(tokens)
            np.dot(self.weights, self.features[layer], self.ranks[layer])

    def verified(self, accepted: NDArray[np.bool_]) -> None:
        """Learn from the last pass anew, now that its sure rows are known.

        An interrupt leaves some layers corrected and others not. Called again, it begins anew.

        Raises:
            InputError: it had another number of rows.
        """
        before, calls = self._draft.corrected(accepted)
        if before is None:
            return
        self.weights[:], self._moments[:], self._targets[:] = before
        for call in calls:
            layer = call.layer
            self.features[layer], self._last[layer] = call.features, call.last
            self._seen[layer] = call.seen
            self._learn_rows(layer, call.scored, call.rows)
        self._draft.clear()  # last: until here all of it can be done again

    def forget_draft(self) -> None:
        self._draft.clear()

    def _observe_rows(self, layer: int, scored: Scored, rows: Rows) -> None:
        """Learn from a call of a few rows; if some may be rejected, keep what `verified` needs."""
        if rows.sure.all():
            self._draft.clear()
        else:
            before = self.weights, self._moments, self._targets
            known = self.features[layer], self._last[layer], self._seen[layer]
            self._draft.add(Drafted(layer, scored, rows, *known), before)
        self._learn_rows(layer, scored, rows)

    def _learn_rows(self, layer: int, scored: Scored, rows: Rows) -> None:
        """Learn one step from several rows: the weighted mean of their choices and scores."""
        ids, weights, scores, _ = scored
        shares = self._shares(rows)
        experts, chosen = len(self._shown), ids.ravel()
        counted = np.repeat(shares, ids.shape[1])
        self._chosen[:] = np.bincount(chosen, counted, experts)
        if scores is not None:
            np.dot(shares, scores, self._shown)
        else:
            self._shown[:] = np.bincount(chosen, counted * weights.ravel(), experts)
        learn = self._learn_natively if self._native else self._learn_token
        learn(layer, shares_given=True)
        self._seen[layer] += 1
        if layer == len(self.ranks) - 1:
            self._solve(1)
            np.dot(self.weights, self.features[layer], self.ranks[layer])

    def _shares(self, rows: Rows) -> Shares:
        """`row_shares`, computed once in a pass: its calls have the same rows."""
        known, shares = self._known_shares
        if known is not rows:
            shares = row_shares(rows)
            self._known_shares = rows, shares
        return shares

    def _learn_natively(self, layer: int, shares_given: bool = False) -> None:
        """`_learn_token` in C."""
        if self._memory is None:
            self._give_addresses()
        learn_token(
            self._starts[layer],
            len(self._shown),
            0 if shares_given else len(self._ids),
            self._top_k,
            self._seen[layer],
        )

    def _give_addresses(self) -> None:
        """Collect what one_token.c reads and writes, in its order."""
        shared: list[NDArray[Any]] = [DECAYS, np.array(AGES), np.array([SCORE_STEP]), self.weights]
        shared += [self._moments, self._targets, self._chosen]
        token: list[NDArray[Any]] = [self._shown, self._ids]
        rows = []
        for layer in range(len(self.ranks)):
            own = self.features[layer], self._last[layer], self.ranks[layer]
            arrays = [*shared, *own, *token]
            assert all(array.flags.c_contiguous for array in arrays)
            rows.append([array.ctypes.data for array in arrays])
        # Kept alive, whatever becomes of this object's other attributes.
        self._addressed = [*shared, *token, self.features, self._last, self.ranks]
        memory = np.array(rows, np.uintp)
        self._starts = [row.ctypes.data for row in memory]
        self._memory = memory  # last: it says that the starts are known

    def _learn_token(self, layer: int, shares_given: bool = False) -> None:
        """Learn from the token in the buffers, update its layer's features, and rank anew.

        Args:
            shares_given: whether `_chosen` holds the shares of a few rows; then `_ids` is not read.
        """
        ids, features = self._ids, self.features[layer]
        if not shares_given:
            self._chosen.fill(0.0)
            self._chosen[ids] = 1.0
        if self._seen[layer]:
            np.dot(features, features.T, self._products)
            self._moments += self._products
            np.dot(features, self._chosen, self._sums)
            self._targets += self._sums
        self._advance(layer, None if shares_given else ids)
        self._update_scores(features)
        np.dot(self.weights, features, self.ranks[layer])

    def _advance(self, layer: int, ids: NDArray[np.int64] | None) -> None:
        """Update one layer's frequencies and ages for one step.

        Args:
            ids: [K] a token's experts, which `_chosen` holds too; None for a few rows.
        """
        features = self.features[layer]
        frequencies, ages = features[:FREQUENCIES], features[FREQUENCIES:-2]
        np.multiply(STEPS, self._chosen, self._added)
        frequencies *= KEPT_SHARES
        frequencies += self._added
        now = self._seen[layer] + 1
        last = self._last[layer]
        if ids is None:
            used = np.flatnonzero(self._chosen)
            share, age = self._chosen[used], now - last[used]
            last[used] = now - (1 / (share / NEAR + (1 - share) / (age + NEAR)) - NEAR)
        else:
            last[ids] = now
        np.subtract(now, last, self._change)
        np.add(self._change, OFFSETS, ages)
        np.reciprocal(ages, ages)

    def _update_scores(self, features: Ranks) -> None:
        """Update one layer's two score features, scaled to a sum of top-k."""
        total = float(self._shown.sum())
        scale = self._top_k / total if total > 0.0 else 0.0
        newest, decayed = features[-2], features[-1]
        np.multiply(self._shown, scale, newest)
        change = self._change
        np.subtract(newest, decayed, change)
        change *= SCORE_STEP
        decayed += change

    def _skip(self, layer: int, ids: Ids) -> None:
        """Update frequencies and ages for many tokens at once; `ids` [T, K]."""
        tokens, width = ids.shape
        features = self.features[layer]
        experts = features.shape[1]
        chosen = ids.ravel()
        for index, step in enumerate(DECAYS):
            shares = step * fading(step, tokens)
            shares = np.repeat(shares, width)
            added = np.bincount(chosen, weights=shares, minlength=experts)
            kept = features[index] * (1 - step) ** tokens
            features[index] = kept + added
        # Of an expert chosen by several tokens the last one counts: later assignments win.
        numbers = self._seen[layer] + 1 + np.arange(tokens)
        last = self._last[layer]
        last[chosen] = np.repeat(numbers, width)
        self._seen[layer] += tokens

    def _solve(self, tokens: int) -> None:
        """Once a pass, after its last layer: new weights from all evidence so far."""
        prior = PRIOR * np.eye(FEATURES)
        moments = self._moments + prior
        targets = self._targets + PRIOR * START
        self.weights[:] = np.linalg.solve(moments, targets)
        keep = FORGET ** min(tokens, STEPWISE)
        self._moments *= keep
        self._targets *= keep
