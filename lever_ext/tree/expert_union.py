"""The experts that a tree adds to the union which a pass must read, and the time that costs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lever_ext.tree.token_tree import DraftedToken

RECENT = 48
"""Passes that learning looks back on."""
FADING = 0.95
"""Weight of a pass against the next one when recent passes are fitted."""
OLD_TOKEN = 16
"""Observations of a token after which they are halved: its routing depends on the context too."""


class GrowingUnion(Protocol):
    """The expected reads of a set of nodes that grows by one node at a time."""

    def peek(self, drafted: DraftedToken) -> float:
        """Microseconds of all reads if the node were added."""
        ...

    def add(self, drafted: DraftedToken) -> float:
        """Add a node; microseconds of all reads. Mutates."""
        ...


class Union(Protocol):
    """Expected bytes, as time, that a set of nodes makes the target read."""

    def start(self) -> GrowingUnion:
        """An empty set to add to."""
        ...

    def prefixes(self, drafted: Sequence[DraftedToken]) -> NDArray[np.float64]:
        """Microseconds of the first node alone, of the first two, and so on: float64 [N]."""
        ...


class NoUnion:
    """A dense target: every pass reads the same bytes, and they are in the latency table."""

    def start(self) -> NoUnion:
        return self

    def peek(self, drafted: DraftedToken) -> float:
        return 0.0

    def add(self, drafted: DraftedToken) -> float:
        return 0.0

    def prefixes(self, drafted: Sequence[DraftedToken]) -> NDArray[np.float64]:
        return np.zeros(len(drafted))


class ExpertUnion:
    """Expected time to read the experts that a tree's tokens select and that are not resident.

    For each layer and expert, the chance that no node selects it is the product over the nodes of
    1 - p(expert | node). p is what was forecast for the node. Without a forecast it is what was
    seen of the node's token, filled up with how the last passes were routed: a text keeps to its
    experts for a while.

    Nodes of one tree share a context, so they agree more often than a product of chances says. What
    is left of that after the context is taken into account is learned: with M experts missing and
    the product's expectation U,

        reads = M (1 - exp(-a x^b)),  x = -log(1 - U / M)

    In no paper: our headline term.

    Args:
        layers: MoE layers of the target, L.
        experts: routed experts of a layer, E.
        top_k: experts that a token selects, K.
        read_us: microseconds to read one expert.
        prior: how many observations the context counts against a token's own.
        step: weight of a new pass in the context.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        read_us: float = 0.0,
        prior: float = 0.4,
        step: float = 0.3,
    ) -> None:
        self.shape = (layers, experts)
        self.top_k = top_k
        self.read_us = read_us
        self.prior = prior
        self.step = step
        self.context: NDArray[np.float64] = np.full(self.shape, top_k / experts)
        """Moving average over passes of the share of nodes that selected each expert, [L, E]."""
        self.missing: NDArray[np.float64] = np.ones(layers * experts)
        """[L * E]: 1 where the expert is not resident, 0 where it is."""
        self.bend = (-0.1, 0.8)
        """(log a, b); the start values were measured on an 8-expert model."""
        self._bends: deque[tuple[float, float]] = deque(maxlen=RECENT)
        """(log x, log(a x^b)) of recent passes."""
        self._seen: dict[int, tuple[int, NDArray[np.float64]]] = {}
        """Token -> (observations, how often it selected each expert [L, E])."""
        self._unselected: dict[int, NDArray[np.float64]] = {}
        """Token -> chance that it does not select each expert, [L * E]. Cleared by each pass."""
        self._forecasts: dict[int, NDArray[np.float64]] = {}
        """Node -> the same, from its forecast."""

    def start(self) -> GrowingUnion:
        return _Selected(self)

    def prefixes(self, drafted: Sequence[DraftedToken]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.read_us * self.reads(self._survivals(drafted))
        return found

    def probabilities(self, token: int) -> NDArray[np.float64]:
        """Chance that each expert is selected for the token, float64 [L, E]."""
        count, sums = self._observed(token)
        context = self.prior * self.context
        found: NDArray[np.float64] = (sums + context) / (count + self.prior)
        return found

    def forecast(self, node: int, ids: NDArray[np.int64], share: float) -> None:
        """Say which experts a node will select.

        Args:
            node: its key.
            ids: the forecast experts, [L, K].
            share: of such forecasts that are right.

        Mutates: the forecasts.
        """
        others = self.context.copy()
        np.put_along_axis(others, ids, 0.0, axis=1)
        # What forecasts miss lies among the other experts, as often as the context says.
        total = np.maximum(others.sum(axis=1, keepdims=True), 1e-9)
        found = others * ((1 - share) * self.top_k / total)
        np.put_along_axis(found, ids, share, axis=1)
        self._forecasts[node] = 1 - np.minimum(found, 1.0).ravel()

    def forget_forecasts(self, keep: Container[int]) -> None:
        """Drop the forecasts of nodes that are not among `keep`. Mutates."""
        gone = [node for node in self._forecasts if node not in keep]
        for node in gone:
            del self._forecasts[node]

    def observe(
        self,
        drafted: Sequence[DraftedToken],
        chosen: NDArray[np.int64],
        reads: int,
    ) -> None:
        """Learn from a pass.

        Args:
            drafted: its N nodes.
            chosen: the experts that they selected, int64 [L, N, K].
            reads: how many experts had to be read.

        Mutates: context, bend and what is known of the tokens.
        """
        self._observe_reads(drafted, reads)
        layers, experts = self.shape
        selected = np.zeros((layers, len(drafted), experts))
        np.put_along_axis(selected, chosen, 1.0, axis=2)
        for node, (token, _) in enumerate(drafted):
            self._observe_token(token, selected[:, node])
        self.context += self.step * (selected.mean(axis=1) - self.context)
        self._unselected.clear()

    def set_resident(self, resident: Iterable[tuple[int, int]]) -> None:
        """Say which (layer, expert) need no read now. Mutates."""
        experts = self.shape[1]
        self.missing[:] = 1.0
        for layer, expert in resident:
            self.missing[layer * experts + expert] = 0.0

    def unselected_by(self, drafted: DraftedToken) -> NDArray[np.float64]:
        """Chance that a node does not select each expert, [L * E]."""
        if drafted.node in self._forecasts:
            return self._forecasts[drafted.node]
        token = drafted.token
        if token not in self._unselected:
            self._unselected[token] = 1 - self.probabilities(token).ravel()
        return self._unselected[token]

    def reads(self, survival: NDArray[np.float64]) -> NDArray[np.float64]:
        """Experts to read, [...].

        Args:
            survival: chance that no node selects each expert, [..., L * E].
        """
        missing = max(1.0, float(self.missing.sum()))
        share = (1 - survival) @ self.missing / missing
        x = -np.log(np.clip(1 - share, 1e-9, 1.0))
        log_a, b = self.bend
        found: NDArray[np.float64] = -missing * np.expm1(-math.exp(log_a) * x**b)
        return found

    def _observed(self, token: int) -> tuple[int, NDArray[np.float64]]:
        """(observations of a token, sums of what it selected [L, E])."""
        return self._seen.get(token, (0, np.zeros(self.shape)))

    def _observe_token(self, token: int, selected: NDArray[np.float64]) -> None:
        count, sums = self._observed(token)
        if count < OLD_TOKEN:
            self._seen[token] = (count + 1, sums + selected)
        else:
            self._seen[token] = (OLD_TOKEN // 2, (sums + selected) / 2)

    def _survivals(self, drafted: Sequence[DraftedToken]) -> NDArray[np.float64]:
        """Chance that none of the first n nodes selects each expert, [N, L * E]."""
        unselected = np.stack([self.unselected_by(node) for node in drafted])
        return np.cumprod(unselected, axis=0, dtype=np.float64)

    def _observe_reads(self, drafted: Sequence[DraftedToken], reads: int) -> None:
        """Compare the product's expectation with what a pass really read. Mutates: the bend."""
        missing = self.missing.sum()
        if missing <= 0:
            return
        unread = self._survivals(drafted)[-1] @ self.missing / missing
        expected = -math.log(max(1e-9, unread))
        actual = -math.log(max(1e-3, 1 - max(reads, 0.5) / missing))
        self._bends.append((math.log(max(expected, 1e-3)), math.log(actual)))
        self._fit_bend()

    def _fit_bend(self) -> None:
        """Least squares through recent passes.

        Two points of the start values are held: passes over trees of one size do not tell a from b.
        """
        x, y = np.asarray(self._bends).T
        held = np.array([-1.5, 1.2])
        ages = np.arange(len(x) - 1, -1, -1)
        weights = np.concatenate([FADING**ages, [0.5, 0.5]])
        scale = np.sqrt(weights)
        ones = np.ones(len(x) + len(held))
        matrix = np.column_stack([ones, np.concatenate([x, held])])
        values = np.concatenate([y, 0.8 * held - 0.1])
        solution = np.linalg.lstsq(matrix * scale[:, None], values * scale, rcond=None)
        log_a, b = solution[0]
        self.bend = (float(log_a), float(min(max(b, 0.2), 1.2)))


class _Selected:
    """The experts that a growing set of nodes selects."""

    def __init__(self, union: ExpertUnion) -> None:
        self._union = union
        self._survival = np.ones(union.missing.shape)
        """Chance that no node so far selects each expert, [L * E]."""

    def peek(self, drafted: DraftedToken) -> float:
        survival = self._survival * self._union.unselected_by(drafted)
        return float(self._union.reads(survival)) * self._union.read_us

    def add(self, drafted: DraftedToken) -> float:
        self._survival = self._survival * self._union.unselected_by(drafted)
        return float(self._union.reads(self._survival)) * self._union.read_us
