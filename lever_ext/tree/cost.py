"""What a cycle costs: drafting, the verification pass, and the experts that a tree adds to the union to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Union(Protocol):
    """Expected bytes, as time, that a set of tokens makes the target read; it grows by one token at a time."""

    def start(self) -> Union:
        """A union of its own to add to, holding nothing."""
        ...

    def peek(self, token: int) -> float:
        """The whole union's expected microseconds if the token were added."""
        ...

    def add(self, token: int) -> float:
        """Add a token; the whole union's expected microseconds. Mutates."""
        ...


class NoUnion:
    """A dense target: every pass reads the same bytes, and they are in the latency table."""

    def start(self) -> NoUnion:
        return self

    def peek(self, token: int) -> float:
        return 0.0

    def add(self, token: int) -> float:
        return 0.0


class ExpertUnion:
    """Expected time to read the experts that a tree's tokens select and that are not resident.

    For each layer and expert, the chance that no node selects it is the product over the nodes of
    1 - p(expert | token); p is what was seen of that token, filled up with the layer's overall rate. In no paper: our
    headline term.

    Args:
        layers, experts, top_k: of the target.
        read_us: microseconds to read one expert.
        prior: how many observations the overall rate counts against a token's own.
    """

    def __init__(self, layers: int, experts: int, top_k: int, read_us: float = 0.0, prior: float = 1.0) -> None:
        self.shape = (layers, experts)
        self.top_k = top_k
        self.read_us = read_us
        self.prior = prior
        self.rates: NDArray[np.float64] = np.full(self.shape, top_k / experts)
        self.missing: NDArray[np.float64] = np.ones(layers * experts)
        """[L * E]: 1 where the expert is not resident, 0 where it is."""
        self._seen: dict[int, tuple[int, NDArray[np.float64]]] = {}
        self._misses: dict[int, NDArray[np.float64]] = {}
        """Token -> chance that it does not select each expert, [L * E]."""
        self._survival: NDArray[np.float64] | None = None
        """Chance that no token so far selects each expert, [L * E]."""

    def start(self) -> ExpertUnion:
        fresh = object.__new__(ExpertUnion)
        fresh.__dict__.update(self.__dict__)
        fresh._survival = np.ones(self.missing.shape)
        return fresh

    def peek(self, token: int) -> float:
        return self._price(self._with(token))

    def add(self, token: int) -> float:
        self._survival = self._with(token)
        return self._price(self._survival)

    def _with(self, token: int) -> NDArray[np.float64]:
        assert self._survival is not None, "add to what start() gave"
        if token not in self._misses:
            self._misses[token] = 1 - self.probabilities(token).ravel()
        return self._survival * self._misses[token]

    def _price(self, survival: NDArray[np.float64]) -> float:
        return float(self.missing.sum() - survival @ self.missing) * self.read_us

    def probabilities(self, token: int) -> NDArray[np.float64]:
        """Chance that each expert is selected for the token, float64 [L, E]."""
        count, sums = self._seen.get(token, (0, np.zeros(self.shape)))
        found: NDArray[np.float64] = (sums + self.prior * self.rates) / (count + self.prior)
        return found

    def observe(self, token: int, chosen: NDArray[np.int64]) -> None:
        """Learn a token's experts, int64 [L, K]. Mutates."""
        hot = np.zeros(self.shape)
        np.put_along_axis(hot, chosen, 1.0, axis=1)
        count, sums = self._seen.get(token, (0, np.zeros(self.shape)))
        # Halved when it grows old: routing depends on the context too.
        self._seen[token] = (count + 1, sums + hot) if count < 16 else (8, sums / 2 + hot / 2)
        self.rates += 0.02 * (hot - self.rates)
        self._misses.clear()

    def set_resident(self, resident: Iterable[tuple[int, int]]) -> None:
        """Say which (layer, expert) need no read now. Mutates."""
        self.missing[:] = 1.0
        for layer, expert in resident:
            self.missing[layer * self.shape[1] + expert] = 0.0


@dataclass
class CycleCost:
    """Predicted microseconds of a cycle.

    Args:
        verify: (rows, leaves) -> microseconds of the target pass, measured after overlap.
        union: expected expert reads.
        fixed_us: what every cycle costs besides.
    """

    verify: Callable[[int, int], float]
    union: Union = field(default_factory=NoUnion)
    fixed_us: float = 0.0
    draft_step: float = 0.15
    draft_times: dict[int, float] = field(default_factory=dict)
    """Nodes in a draft call -> moving average of its microseconds."""

    def observe_draft(self, nodes: int, us: float) -> None:
        """Add the measured time of one draft call over `nodes` nodes. Mutates."""
        old = self.draft_times.get(nodes)
        self.draft_times[nodes] = us if old is None else old + self.draft_step * (us - old)

    def draft_us(self, nodes: int) -> float:
        """Predicted time of one draft call; between and beyond measured sizes, the nearest."""
        if not self.draft_times:
            return 0.0
        if nodes in self.draft_times:
            return self.draft_times[nodes]
        near = min(self.draft_times, key=lambda known: (abs(known - nodes), -known))
        # A larger call is assumed to cost in proportion to no more than a quarter of its extra nodes.
        return self.draft_times[near] * (1 + 0.25 * max(0, nodes - near) / near)
