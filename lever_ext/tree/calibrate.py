"""From a draft's probabilities to the probability that the target takes a token (paper 2a).

The form is our choice:

    calibrate(a) = p(a)^gamma / (sum over candidates of p^gamma
                                 + rest * (1 - sum over candidates of p))

`gamma` sharpens or flattens the draft's own distribution. `rest` says how much of the probability
that the draft gives to tokens beyond its candidates the target really takes from there. Both are
fitted online to what the target chose, and both keep the draft's order.

The candidates' sum, the paper's reliability factor r, is then near 1 where the draft is sure and
smaller where it is not. One r for all nodes made chains of sure tokens look 4 % too unlikely at
every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEAST_BEYOND = 0.02
"""At least this share of a draft's distribution is taken to lie beyond its candidates."""
LEAST_PROBABILITY = 1e-9
RANK_STEP = 0.05
"""Weight of a new node in the average by rank."""


class Candidates(NamedTuple):
    """A draft's most likely tokens after a node, the likeliest first."""

    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]
    """The draft's own, over the whole vocabulary: they add up to at most 1."""


@dataclass
class Calibration:
    """What recent verifications say about a draft.

    Args:
        rest: start value.
        gamma: start value of the sharpness; 1 keeps the draft's proportions.
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
    """Moving average of the calibrated probabilities by rank: an estimate for the children of nodes
    that were not drafted yet.
    """

    def __call__(self, candidates: Candidates) -> list[float]:
        """Probability of each candidate given that verification reaches their parent.

        They add up to less than 1.
        """
        if not candidates.tokens:
            return []
        values = self._values(candidates)
        count, known = len(values), len(self.ranks)
        if known < count:
            self.ranks = np.concatenate([self.ranks, values[known:]])
        error = np.asarray(values) - self.ranks[:count]
        self.ranks[:count] += RANK_STEP * error
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
        rest = self.rest * math.exp(self.step * (total - hit))
        self.rest = min(max(rest, 0.02), 1e3)
        if hit:
            self._fit_gamma(candidates, values, token)

    def _fit_gamma(self, candidates: Candidates, values: list[float], token: int) -> None:
        """A damped Newton step on log(p^gamma / sum p^gamma).

        The damping keeps it steady for sharp and for flat drafts alike.
        """
        total = sum(values)
        logs = [math.log(max(p, LEAST_PROBABILITY)) for p in candidates.probabilities]
        weighted = list(zip(values, logs, strict=True))
        mean = sum(weight * log for weight, log in weighted) / total
        spread = sum(weight * (log - mean) ** 2 for weight, log in weighted) / total
        chosen = logs[candidates.tokens.index(token)]
        step = (chosen - mean) / (spread + 0.5)
        self.gamma = min(max(self.gamma + self.rate * step, 0.1), 3.0)

    def _values(self, candidates: Candidates) -> list[float]:
        raised = [max(p, LEAST_PROBABILITY) ** self.gamma for p in candidates.probabilities]
        # A draft that is quite sure of its candidates may still be wrong.
        beyond = max(1 - sum(candidates.probabilities), LEAST_BEYOND)
        total = sum(raised) + self.rest * beyond
        return [value / total for value in raised]
