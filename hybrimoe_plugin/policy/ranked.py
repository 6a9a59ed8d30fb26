"""What every cache policy is: a rank for each expert of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]


class CachePolicy(Protocol):
    """Ranks experts by what the router did so far. Layers are positions among the MoE layers."""

    name: str
    probabilities: bool
    """Whether ranks estimate the chance of use at the layer's next token."""
    ranks: NDArray[np.float64]
    """[L, E]; the lowest goes first. Rows of layers that share slots are compared with one another.
    """

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        """Learn from one layer call: ids and weights [T, K], scores [T, E] where the host shows
        them. Mutates.
        """
        ...

    def victim(self, layer: int, candidates: Sequence[int]) -> int:
        """The candidate to evict first; candidates are never empty. Deterministic."""
        ...

    def admits(self, layer: int, expert: int, victim: int) -> bool:
        """Whether a newcomer may take the slot of another expert of its layer."""
        ...

    def prefers(self, newcomer: float, victim: float) -> bool:
        """Whether an expert of one rank may take the slot of one of another, whatever
        their layers.
        """
        ...

    def initial(self, layer: int, count: int) -> list[int]:
        """The experts to load before the first call."""
        ...


class RankedCache:
    """A cache that keeps one number per expert and evicts the lowest; the base of all that follow.

    A newcomer is admitted if it ranks at least as high as the victim.

    Args:
        popularity: [L, E] shares of earlier text, the ranks to start with; without it all experts
            start equal.
    """

    name = ""
    probabilities = False

    def __init__(
        self, layers: int, experts: int, popularity: NDArray[np.float64] | None = None
    ) -> None:
        self.ranks = (
            np.zeros((layers, experts))
            if popularity is None
            else np.array(popularity, dtype=np.float64)
        )
        if self.ranks.shape != (layers, experts):
            raise ValueError(
                f"popularity must be [{layers}, {experts}], found {list(self.ranks.shape)}"
            )

    def observe(
        self, layer: int, topk_ids: Ids, topk_weights: Scores, scores: Scores | None
    ) -> None:
        """Learn from one layer call; each policy has its own rule. Mutates `ranks`."""
        raise AssertionError("a policy without a rule")

    def victim(self, layer: int, candidates: Sequence[int]) -> int:
        ranks = self.ranks[layer]
        return min(candidates, key=lambda expert: (ranks[expert], expert))

    def admits(self, layer: int, expert: int, victim: int) -> bool:
        return self.prefers(float(self.ranks[layer, expert]), float(self.ranks[layer, victim]))

    def prefers(self, newcomer: float, victim: float) -> bool:
        return newcomer >= victim

    def initial(self, layer: int, count: int) -> list[int]:
        order = np.argsort(-self.ranks[layer], kind="stable")
        return [int(expert) for expert in order[:count]]
