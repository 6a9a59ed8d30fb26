"""From a draft's probabilities to the probability that the target takes a token (paper 2a; its form is our choice).

    calibrate(a) = r * p(a)^gamma / sum over candidates of p^gamma

The candidates of a node share `r`, how often the target's token was among the candidates; `gamma` sharpens or flattens
the draft's own distribution and is fitted online to what the target chose. Both keep the draft's order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Candidates(NamedTuple):
    """A draft's most likely tokens after a node, the likeliest first."""

    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]
    """The draft's own, over the whole vocabulary: they add up to at most 1."""


@dataclass
class Calibration:
    """What recent verifications say about a draft.

    Args:
        reliability: r to start with.
        gamma: sharpness to start with; 1 keeps the draft's proportions.
        step: weight of a new observation in r.
        rate: learning rate of gamma.
    """

    reliability: float = 0.8
    gamma: float = 1.0
    step: float = 0.04
    rate: float = 0.02
    seen: int = 0
    """Positions observed."""
    agreed: int = 0
    """Of them, positions where the draft's likeliest token was the target's."""
    ranks: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Moving average of the calibrated probabilities by rank: what an unseen node's children will be like."""

    def __call__(self, candidates: Candidates) -> list[float]:
        """Probability of each candidate given that verification reaches their parent; they add up to r."""
        if not candidates.tokens:
            return []
        weights = self._weights(candidates)
        values = [self.reliability * weight for weight in weights]
        if len(self.ranks) < len(values):
            self.ranks = np.concatenate([self.ranks, values[len(self.ranks) :]])
        self.ranks[: len(values)] += 0.05 * (np.asarray(values) - self.ranks[: len(values)])
        return values

    def observe(self, candidates: Candidates, token: int) -> None:
        """Learn that the target chose `token` after the candidates' parent.

        Mutates: reliability and gamma.
        """
        if not candidates.tokens:
            return
        hit = token in candidates.tokens
        self.seen += 1
        self.agreed += token == candidates.tokens[0]
        self.reliability += self.step * (float(hit) - self.reliability)
        self.reliability = min(max(self.reliability, 0.02), 0.99)
        if not hit:
            return
        logs = [math.log(max(p, 1e-9)) for p in candidates.probabilities]
        weights = self._weights(candidates)
        expected = sum(w * log for w, log in zip(weights, logs, strict=True))
        spread = sum(w * (log - expected) ** 2 for w, log in zip(weights, logs, strict=True))
        # A damped Newton step on log(p^gamma / sum p^gamma): steady for sharp and for flat drafts alike.
        step = (logs[candidates.tokens.index(token)] - expected) / (spread + 0.5)
        self.gamma = min(max(self.gamma + self.rate * step, 0.1), 3.0)

    def _weights(self, candidates: Candidates) -> list[float]:
        logs = [self.gamma * math.log(max(p, 1e-9)) for p in candidates.probabilities]
        top = max(logs)
        raised = [math.exp(log - top) for log in logs]
        total = sum(raised)
        return [value / total for value in raised]
