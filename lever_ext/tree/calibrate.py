"""From a draft's probabilities to the probability that the target takes a token (paper 2a; its form
is our choice).

    calibrate(a) = p(a)^gamma / (sum over candidates of p^gamma + rest * (1 - sum over candidates of
    p))

`gamma` sharpens or flattens the draft's own distribution; `rest` says how much of what the draft
gives to tokens beyond its candidates the target really takes from there. Both are fitted online to
what the target chose and keep the draft's order. The candidates' sum, the paper's reliability
factor r, is then near 1 where the draft is sure and less where it is not: one r for all nodes made
sure chains look 4 % a step too unlikely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEAST_BEYOND = 0.02
"""Share of a draft's distribution that is taken to lie beyond its candidates at least."""


class Candidates(NamedTuple):
    """A draft's most likely tokens after a node, the likeliest first."""

    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]
    """The draft's own, over the whole vocabulary: they add up to at most 1."""


@dataclass
class Calibration:
    """What recent verifications say about a draft.

    Args:
        rest: to start with.
        gamma: sharpness to start with; 1 keeps the draft's proportions.
        step: learning rate of rest's logarithm.
        rate: learning rate of gamma.
    """

    rest: float = 0.5
    gamma: float = 1.0
    step: float = 0.2
    rate: float = 0.02
    seen: int = 0
    """Positions observed."""
    agreed: int = 0
    """Of them, positions where the draft's likeliest token was the target's."""
    ranks: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Moving average of the calibrated probabilities by rank: what an unseen node's children will
    be like.
    """

    def __call__(self, candidates: Candidates) -> list[float]:
        """Probability of each candidate given that verification reaches their parent; they add up
        to less than 1.
        """
        if not candidates.tokens:
            return []
        values = self._values(candidates)
        if len(self.ranks) < len(values):
            self.ranks = np.concatenate([self.ranks, values[len(self.ranks) :]])
        self.ranks[: len(values)] += 0.05 * (np.asarray(values) - self.ranks[: len(values)])
        return values

    def observe(self, candidates: Candidates, token: int) -> None:
        """Learn that the target chose `token` after the candidates' parent.

        Mutates: rest and gamma.
        """
        if not candidates.tokens:
            return
        hit = token in candidates.tokens
        self.seen += 1
        self.agreed += token == candidates.tokens[0]
        values = self._values(candidates)
        total = sum(values)
        # The gradient of the likelihood of being or not being among the candidates.
        self.rest = min(max(self.rest * math.exp(self.step * (total - hit)), 0.02), 1e3)
        if not hit:
            return
        logs = [math.log(max(p, 1e-9)) for p in candidates.probabilities]
        expected = sum(w * log for w, log in zip(values, logs, strict=True)) / total
        spread = sum(w * (log - expected) ** 2 for w, log in zip(values, logs, strict=True)) / total
        # A damped Newton step on log(p^gamma / sum p^gamma): steady for sharp and for flat drafts
        # alike.
        step = (logs[candidates.tokens.index(token)] - expected) / (spread + 0.5)
        self.gamma = min(max(self.gamma + self.rate * step, 0.1), 3.0)

    def _values(self, candidates: Candidates) -> list[float]:
        raised = [max(p, 1e-9) ** self.gamma for p in candidates.probabilities]
        # A draft that is quite sure of its candidates may still be wrong.
        beyond = self.rest * max(1 - sum(candidates.probabilities), LEAST_BEYOND)
        total = sum(raised) + beyond
        return [value / total for value in raised]
