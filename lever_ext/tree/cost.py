"""What a cycle costs: drafting, the verification pass, and the experts that a tree adds to the union to be read."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

RECENT = 48
"""Passes that learning looks back on."""


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

    def prefixes(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Expected microseconds of the first token alone, of the first two, and so on: float64 [N]."""
        ...


class NoUnion:
    """A dense target: every pass reads the same bytes, and they are in the latency table."""

    def start(self) -> NoUnion:
        return self

    def peek(self, token: int) -> float:
        return 0.0

    def add(self, token: int) -> float:
        return 0.0

    def prefixes(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        return np.zeros(len(tokens))


class ExpertUnion:
    """Expected time to read the experts that a tree's tokens select and that are not resident.

    For each layer and expert, the chance that no node selects it is the product over the nodes of
    1 - p(expert | token); p is what was seen of that token, filled up with how the last passes were routed: a text
    keeps to its experts for a while. Nodes of one tree share a context, so they agree more often than chances that
    are multiplied say. What is left of that after the context is taken into account is learned: with M experts
    missing and the product's expectation U,

        reads = M (1 - exp(-a x^b)),  x = -log(1 - U / M)

    In no paper: our headline term.

    Args:
        layers, experts, top_k: of the target.
        read_us: microseconds to read one expert.
        prior: how many observations the context counts against a token's own.
        step: weight of a new pass in the context.
    """

    def __init__(
        self, layers: int, experts: int, top_k: int, read_us: float = 0.0, prior: float = 1.0, step: float = 0.3
    ) -> None:
        self.shape = (layers, experts)
        self.top_k = top_k
        self.read_us = read_us
        self.prior = prior
        self.step = step
        self.context: NDArray[np.float64] = np.full(self.shape, top_k / experts)
        """Moving average over passes of the share of rows that selected each expert, [L, E]."""
        self.missing: NDArray[np.float64] = np.ones(layers * experts)
        """[L * E]: 1 where the expert is not resident, 0 where it is."""
        self.bend = (-0.1, 0.8)
        """(log a, b); the start is what was seen of an 8-expert model."""
        self._bends: deque[tuple[float, float]] = deque(maxlen=RECENT)
        """(log x, log(a x^b)) of recent passes."""
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
        return float(self._reads(self._with(token))) * self.read_us

    def add(self, token: int) -> float:
        self._survival = self._with(token)
        return float(self._reads(self._survival)) * self.read_us

    def prefixes(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        return self._reads(self._survivals(tokens)) * np.float64(self.read_us)

    def probabilities(self, token: int) -> NDArray[np.float64]:
        """Chance that each expert is selected for the token, float64 [L, E]."""
        count, sums = self._seen.get(token, (0, np.zeros(self.shape)))
        found: NDArray[np.float64] = (sums + self.prior * self.context) / (count + self.prior)
        return found

    def observe(self, tokens: Sequence[int], chosen: NDArray[np.int64], reads: int) -> None:
        """Learn from a pass over N tokens: experts int64 [L, N, K], and how many had to be read. Mutates."""
        missing = self.missing.sum()
        if missing > 0:
            x = -math.log(max(1e-9, self._survivals(tokens)[-1] @ self.missing / missing))
            self._bends.append((math.log(max(x, 1e-3)), math.log(-math.log(max(1e-3, 1 - max(reads, 0.5) / missing)))))
            self._fit_bend()
        hot = np.zeros((self.shape[0], len(tokens), self.shape[1]))
        np.put_along_axis(hot, chosen, 1.0, axis=2)
        for row, token in enumerate(tokens):
            count, sums = self._seen.get(token, (0, np.zeros(self.shape)))
            # Halved when it grows old: routing depends on the context too.
            self._seen[token] = (count + 1, sums + hot[:, row]) if count < 16 else (8, (sums + hot[:, row]) / 2)
        self.context += self.step * (hot.mean(axis=1) - self.context)
        self._misses.clear()

    def set_resident(self, resident: Iterable[tuple[int, int]]) -> None:
        """Say which (layer, expert) need no read now. Mutates."""
        self.missing[:] = 1.0
        for layer, expert in resident:
            self.missing[layer * self.shape[1] + expert] = 0.0

    def _with(self, token: int) -> NDArray[np.float64]:
        assert self._survival is not None, "add to what start() gave"
        return self._survival * self._missed_by(token)

    def _missed_by(self, token: int) -> NDArray[np.float64]:
        if token not in self._misses:
            self._misses[token] = 1 - self.probabilities(token).ravel()
        return self._misses[token]

    def _survivals(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Chance that none of the first n tokens selects each expert, [N, L * E]."""
        found: NDArray[np.float64] = np.cumprod([self._missed_by(token) for token in tokens], axis=0)
        return found

    def _reads(self, survival: NDArray[np.float64]) -> NDArray[np.float64]:
        """Experts to read: [...] from survival [..., L * E]."""
        missing = max(1.0, float(self.missing.sum()))
        x = -np.log(np.clip(1 - (1 - survival) @ self.missing / missing, 1e-9, 1.0))
        log_a, b = self.bend
        found: NDArray[np.float64] = -missing * np.expm1(-math.exp(log_a) * x**b)
        return found

    def _fit_bend(self) -> None:
        """Least squares through recent passes, held near the start where all of them had trees of one size."""
        x, y = np.asarray(self._bends).T
        weights = 0.95 ** np.arange(len(x) - 1, -1, -1)
        held = np.array([-1.5, 1.2])
        matrix = np.column_stack([np.ones(len(x) + 2), np.concatenate([x, held])])
        scale = np.sqrt(np.concatenate([weights, [0.5, 0.5]]))
        wanted = np.concatenate([y, 0.8 * held - 0.1])
        log_a, b = np.linalg.lstsq(matrix * scale[:, None], wanted * scale, rcond=None)[0]
        self.bend = (float(log_a), float(min(max(b, 0.2), 1.2)))


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
