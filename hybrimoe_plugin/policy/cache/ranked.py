"""The interface of every cache policy, and the base class of ours: a rank for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.policy.step import Scored

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]
Ranks = NDArray[np.float64]
Shares = NDArray[np.float64]


class CachePolicy(Protocol):
    """Ranks experts by what the router did so far. Layers are positions among the MoE layers."""

    name: str
    probabilities: bool
    """Whether ranks estimate the probability of use at the layer's next token."""
    ranks: Ranks
    """[L, E]; the lowest goes first. Rows of layers that share slots are compared with one another.
    """

    def observe(self, layer: int, scored: Scored) -> None:
        """Learn from one layer call. Mutates.

        A call of a few rows is one step. A prompt's tokens are steps one after the other.
        """
        ...

    def verified(self, accepted: NDArray[np.bool_]) -> None:
        """The last pass verified a draft: be as if it had been known what is accepted. Mutates.

        Args:
            accepted: [T]
        """
        ...

    def forget_draft(self) -> None:
        """The last pass will not be verified: what was learned from it stays."""
        ...

    def victim(self, layer: int, candidates: Sequence[int]) -> int:
        """The candidate to evict first; candidates are never empty. Deterministic."""
        ...

    def admits(self, layer: int, expert: int, victim: int) -> bool:
        """Whether a newcomer may take the slot of another expert of its layer."""
        ...

    def prefers(self, newcomer: float, victim: float) -> bool:
        """Whether a newcomer's rank is enough to replace a victim's rank, whatever their layers."""
        ...

    def initial(self, layer: int, count: int) -> list[int]:
        """The experts to load before the first call."""
        ...


class RankedCache:
    """Base of all cache policies: keeps one number per expert and evicts the lowest.

    A newcomer is admitted if it ranks at least as high as the victim.

    Args:
        popularity: [L, E] shares of earlier text, the ranks to start with; without it all experts
            start equal.

    Raises:
        ValueError: popularity of another shape.
    """

    name = ""
    probabilities = False

    def __init__(self, layers: int, experts: int, popularity: Ranks | None = None) -> None:
        if popularity is None:
            self.ranks = np.zeros((layers, experts))
        else:
            self.ranks = np.array(popularity, dtype=np.float64, order="C")
        if self.ranks.shape != (layers, experts):
            raise ValueError(
                f"popularity must be [{layers}, {experts}], found {list(self.ranks.shape)}"
            )

    def observe(self, layer: int, scored: Scored) -> None:
        """Learn from one layer call; each policy has its own rule. Mutates `ranks`."""
        raise AssertionError("a policy without a rule")

    def verified(self, accepted: NDArray[np.bool_]) -> None:
        """Nothing: rules that were published for accepted tokens alone count all rows."""

    def forget_draft(self) -> None:
        """Nothing was kept."""

    def victim(self, layer: int, candidates: Sequence[int]) -> int:
        ranks = self.ranks[layer]
        return min(candidates, key=lambda expert: (ranks[expert], expert))

    def admits(self, layer: int, expert: int, victim: int) -> bool:
        ranks = self.ranks[layer]
        return self.prefers(float(ranks[expert]), float(ranks[victim]))

    def prefers(self, newcomer: float, victim: float) -> bool:
        return newcomer >= victim

    def initial(self, layer: int, count: int) -> list[int]:
        order = np.argsort(-self.ranks[layer], kind="stable")
        return [int(expert) for expert in order[:count]]


def fading(step: float, tokens: int) -> Ranks:
    """[T] weights of a call's tokens in a moving average, the newest last.

    Args:
        step: share of the newest token, which is not multiplied in.
    """
    ages = np.arange(tokens - 1, -1, -1, dtype=np.float64)
    return np.asarray((1 - step) ** ages)
