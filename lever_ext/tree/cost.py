"""What a cycle costs: drafting, the verification pass, and the experts that a tree adds to the
union to be read.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

REMEMBERED = 0.97
"""Weight of a cycle in the rate against the next one's."""
FIRST_TREE = 16
"""Rows of a tree whose pass is the first that is measured, at most."""
RECENT = 48
"""Passes that learning looks back on."""


class Drafted(NamedTuple):
    """A node as the union of experts sees it."""

    token: int
    node: int = -1
    """Its key in the candidate tree; -1 for one that is only imagined."""


class Union(Protocol):
    """Expected bytes, as time, that a set of nodes makes the target read; it grows by one node at a
    time.
    """

    def start(self) -> Union:
        """A union of its own to add to, holding nothing."""
        ...

    def peek(self, drafted: Drafted) -> float:
        """The whole union's expected microseconds if the node were added."""
        ...

    def add(self, drafted: Drafted) -> float:
        """Add a node; the whole union's expected microseconds. Mutates."""
        ...

    def prefixes(self, drafted: Sequence[Drafted]) -> NDArray[np.float64]:
        """Expected microseconds of the first node alone, of the first two, and so on:
        float64 [N].
        """
        ...


class NoUnion:
    """A dense target: every pass reads the same bytes, and they are in the latency table."""

    def start(self) -> NoUnion:
        return self

    def peek(self, drafted: Drafted) -> float:
        return 0.0

    def add(self, drafted: Drafted) -> float:
        return 0.0

    def prefixes(self, drafted: Sequence[Drafted]) -> NDArray[np.float64]:
        return np.zeros(len(drafted))


class ExpertUnion:
    """Expected time to read the experts that a tree's tokens select and that are not resident.

    For each layer and expert, the chance that no node selects it is the product over the nodes of
    1 - p(expert | node); p is what was forecast for the node, or else what was seen of its token,
    filled up with how the last passes were routed: a text keeps to its experts for a while. Nodes
    of one tree share a context, so they agree more often than chances that are multiplied say. What
    is left of that after the context is taken into account is learned: with M experts missing and
    the product's expectation U,

        reads = M (1 - exp(-a x^b)),  x = -log(1 - U / M)

    In no paper: our headline term.

    Args:
        layers, experts, top_k: of the target.
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
        self._forecasts: dict[int, NDArray[np.float64]] = {}
        """Node -> the same."""
        self._survival: NDArray[np.float64] | None = None
        """Chance that no token so far selects each expert, [L * E]."""

    def start(self) -> ExpertUnion:
        fresh = object.__new__(ExpertUnion)
        fresh.__dict__.update(self.__dict__)
        fresh._survival = np.ones(self.missing.shape)
        return fresh

    def peek(self, drafted: Drafted) -> float:
        return float(self._reads(self._with(drafted))) * self.read_us

    def add(self, drafted: Drafted) -> float:
        self._survival = self._with(drafted)
        return float(self._reads(self._survival)) * self.read_us

    def prefixes(self, drafted: Sequence[Drafted]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.read_us * self._reads(self._survivals(drafted))
        return found

    def probabilities(self, token: int) -> NDArray[np.float64]:
        """Chance that each expert is selected for the token, float64 [L, E]."""
        count, sums = self._seen.get(token, (0, np.zeros(self.shape)))
        found: NDArray[np.float64] = (sums + self.prior * self.context) / (count + self.prior)
        return found

    def forecast(self, node: int, ids: NDArray[np.int64], share: float) -> None:
        """Say which experts a node will select, ids [L, K], and the share of such forecasts that is
        right. Mutates.
        """
        rest = self.context.copy()
        np.put_along_axis(rest, ids, 0.0, axis=1)
        found = rest * (
            (1 - share) * self.top_k / np.maximum(rest.sum(axis=1, keepdims=True), 1e-9)
        )
        np.put_along_axis(found, ids, share, axis=1)
        self._forecasts[node] = 1 - np.minimum(found, 1.0).ravel()

    def forget_forecasts(self, keep: Container[int]) -> None:
        """Drop those of nodes that are no more. Mutates."""
        for node in [node for node in self._forecasts if node not in keep]:
            del self._forecasts[node]

    def observe(self, drafted: Sequence[Drafted], chosen: NDArray[np.int64], reads: int) -> None:
        """Learn from a pass over N nodes: experts int64 [L, N, K], and how many had to be read.
        Mutates.
        """
        missing = self.missing.sum()
        if missing > 0:
            x = -math.log(max(1e-9, self._survivals(drafted)[-1] @ self.missing / missing))
            self._bends.append(
                (
                    math.log(max(x, 1e-3)),
                    math.log(-math.log(max(1e-3, 1 - max(reads, 0.5) / missing))),
                )
            )
            self._fit_bend()
        hot = np.zeros((self.shape[0], len(drafted), self.shape[1]))
        np.put_along_axis(hot, chosen, 1.0, axis=2)
        for row, (token, _) in enumerate(drafted):
            count, sums = self._seen.get(token, (0, np.zeros(self.shape)))
            # Halved when it grows old: routing depends on the context too.
            self._seen[token] = (
                (count + 1, sums + hot[:, row]) if count < 16 else (8, (sums + hot[:, row]) / 2)
            )
        self.context += self.step * (hot.mean(axis=1) - self.context)
        self._misses.clear()

    def set_resident(self, resident: Iterable[tuple[int, int]]) -> None:
        """Say which (layer, expert) need no read now. Mutates."""
        self.missing[:] = 1.0
        for layer, expert in resident:
            self.missing[layer * self.shape[1] + expert] = 0.0

    def _with(self, drafted: Drafted) -> NDArray[np.float64]:
        assert self._survival is not None, "add to what start() gave"
        return self._survival * self._missed_by(drafted)

    def _missed_by(self, drafted: Drafted) -> NDArray[np.float64]:
        if drafted.node in self._forecasts:
            return self._forecasts[drafted.node]
        token = drafted.token
        if token not in self._misses:
            self._misses[token] = 1 - self.probabilities(token).ravel()
        return self._misses[token]

    def _survivals(self, drafted: Sequence[Drafted]) -> NDArray[np.float64]:
        """Chance that none of the first n nodes selects each expert, [N, L * E]."""
        return np.cumprod(
            np.stack([self._missed_by(node) for node in drafted]), axis=0, dtype=np.float64
        )

    def _reads(self, survival: NDArray[np.float64]) -> NDArray[np.float64]:
        """Experts to read: [...] from survival [..., L * E]."""
        missing = max(1.0, float(self.missing.sum()))
        x = -np.log(np.clip(1 - (1 - survival) @ self.missing / missing, 1e-9, 1.0))
        log_a, b = self.bend
        found: NDArray[np.float64] = -missing * np.expm1(-math.exp(log_a) * x**b)
        return found

    def _fit_bend(self) -> None:
        """Least squares through recent passes, held near the start where all of them had trees of
        one size.
        """
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
    rate: float = 0.0
    """Tokens per microsecond over recent cycles; 0 until there are some."""
    _tokens: float = 0.0
    _us: float = 0.0

    def worth(self, gain: Any, us: Any) -> Any:
        """What a cycle of `gain` expected tokens that takes `us` is worth: numbers or arrays.

        Tokens per microsecond of that cycle, as in the paper, until cycles have been seen. From
        then on its tokens less those that an average cycle makes in the same time: the sum over all
        cycles is what counts, and a cycle of poor prospects had better be short than the best of
        its kind (renewal reward; in no paper on speculation).
        """
        return gain - self.rate * us if self.rate else gain / us

    def observe_cycle(self, tokens: int, us: float) -> None:
        """Add a finished cycle. Mutates."""
        self._tokens, self._us = REMEMBERED * self._tokens + tokens, REMEMBERED * self._us + us
        self.rate = self._tokens / self._us

    def verify_prefixes(self, leaves: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predicted microseconds of passes with 1, 2, ... rows and so many leaves each: float64
        [N].
        """
        at_once = getattr(self.verify, "prefixes", None)
        if at_once is not None:
            found: NDArray[np.float64] = at_once(leaves)
            return found
        return np.array(
            [self.verify(rows, count) for rows, count in enumerate(leaves.tolist(), start=1)]
        )

    def largest_tree(self, max_rows: int) -> int:
        """Rows that a tree may have: twice as many as any measured, lest times of large trees alone
        are ever known.
        """
        measured = getattr(self.verify, "most_rows", None)
        return max_rows if measured is None else min(max_rows, max(FIRST_TREE, 2 * measured))

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
        # A larger call is assumed to cost in proportion to no more than a quarter of its extra
        # nodes.
        return self.draft_times[near] * (1 + 0.25 * max(0, nodes - near) / near)
