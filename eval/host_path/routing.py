"""Routing decisions that hit, or miss, as a case wants it; written where the device leaves them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from eval.host_path.subject import Subject
from hybrimoe_plugin.core import OFFLOADED

RECALL = 0.79
"""Share of the predicted experts that are right, as in the recorded traces of docs/benchmarks.md.
"""
LAYER_US = 100.0
"""What the device takes for a layer, as far as policies can see."""

Ids = NDArray[np.int64]


SETTLING = 40
"""Tokens after which a chain expects hits, behind a case in which everything missed."""


class Case(NamedTuple):
    """What the layer calls of a token are to be."""

    name: str
    misses: int
    """Routed experts that are not in a slot."""
    transfer_us: float
    """Of one expert, by which the plan computes a miss on the CPU or loads it."""
    on_cpu: int
    loads: int
    """What the plan then does."""
    every: int = 1
    """One in so many layer calls misses, by chance; the others hit."""
    settling: int = 12
    """Tokens after which a chain expects what it gets, behind a case that misses as often or more.
    """


HITS = Case("all hits", 0, 60.0, 0, 0)
CASES = (
    HITS,
    Case("one miss: CPU", 1, 1000.0, 1, 0),
    Case("one miss: load", 1, 20.0, 0, 1),
    Case("1 in 8 misses: CPU", 1, 1000.0, 1, 0, every=8, settling=SETTLING),
)


class Arrival(NamedTuple):
    """What the device leaves of one layer call in the host's memory."""

    ids: Ids
    """[K]"""
    weights: NDArray[np.float32]
    """[K]"""
    scores: NDArray[np.float32]
    """[E]"""


class Wanted(NamedTuple):
    """A layer call of the running token."""

    misses: int
    arrival: Arrival


class Script:
    """Writes the routing of one layer call after the other into the host's memory.

    Nearly all of it is made before a token begins: what runs between two layer calls leaves the
    processor's caches to them.

    Args:
        seed: of the choices.
    """

    def __init__(self, subject: Subject, seed: int = 0) -> None:
        self._subject = subject
        self._random = np.random.default_rng(seed)
        spec = subject.engine.layers[0].spec
        self._experts, self._top_k = spec.experts, spec.top_k
        self._layers = range(len(subject.layers))
        self._liked = self._random.normal(size=(len(self._layers), self._experts))
        """[L, E] how much each layer likes each expert, whatever the token."""
        self._token: list[Wanted] = []
        self._guesses: list[torch.Tensor] = []
        """[K] ids that each layer is predicted to choose."""

    def begin(self, case: Case) -> None:
        """Begin a token."""
        self._subject.engine.controller.costs.transfer_us = case.transfer_us
        self._token = [self._wanted(layer, self._share(case)) for layer in self._layers]
        self._guesses = [torch.from_numpy(self._guess(call.arrival.ids)) for call in self._token]

    def arrive(self, layer: int) -> int:
        """Let the device have routed this layer; anew if earlier layers have moved its experts.

        Returns:
            how many of its experts miss.
        """
        misses, arrival = self._token[layer]
        if self._misses(layer, arrival.ids) != misses:
            self._token[layer] = self._wanted(layer, misses)
        sent = self._subject.graph_break(layer)
        for target, values in zip(sent.on_host[1:], self._token[layer].arrival, strict=True):
            target[0].copy_(torch.from_numpy(values))
        for distance, target in enumerate(sent.predictions_on_host, 1):
            target[0].copy_(self._guesses[layer + distance])
        self._subject.clock.pass_by(LAYER_US)
        return misses

    def _share(self, case: Case) -> int:
        """Misses of a layer call."""
        return case.misses if self._random.integers(case.every) == 0 else 0

    def _wanted(self, layer: int, misses: int) -> Wanted:
        ids = self._choose(layer, misses)
        scores = self._scores(layer, ids)
        return Wanted(misses, Arrival(ids, scores[ids] / scores[ids].sum(), scores))

    def _choose(self, layer: int, misses: int) -> Ids:
        """Resident experts, by liking and chance, and as many others as are to miss."""
        ready = self._ready(layer, range(self._experts))
        liked = self._liked[layer] + self._random.gumbel(size=self._experts)
        order = np.argsort(-liked)
        resident = order[ready[order] == 0]
        absent = order[ready[order] == OFFLOADED]
        hits = resident[: self._top_k - misses]
        chosen = np.concatenate((hits, absent[:misses]))
        assert len(chosen) == self._top_k, "the cache holds too few experts for this case"
        self._random.shuffle(chosen)
        return chosen

    def _misses(self, layer: int, ids: Ids) -> int:
        """How many of these are in no slot; -1 where one is on its way."""
        ready = self._ready(layer, ids.tolist())
        absent = ready == OFFLOADED
        return -1 if (ready[~absent] > 0).any() else int(absent.sum())

    def _ready(self, layer: int, experts: Iterable[int]) -> NDArray[np.float64]:
        """When each expert can be used, in us from the time at which the call will begin."""
        controller = self._subject.engine.controller
        begins_us = self._subject.clock.now_us() + LAYER_US
        routed = controller.residency.routed(layer, dict.fromkeys(experts, 1), begins_us)
        return np.array([item.ready_us for item in routed])

    def _scores(self, layer: int, ids: Ids) -> NDArray[np.float32]:
        """[E] probabilities, the highest for the chosen experts."""
        logits = self._liked[layer] + self._random.normal(size=self._experts)
        logits[ids] += logits.max() - logits.min()
        scores = np.exp(logits - logits.max())
        return (scores / scores.sum()).astype(np.float32)

    def _guess(self, right: Ids) -> Ids:
        """What a router that chooses these experts was predicted to choose."""
        ids = right.copy()
        wrong = self._random.random(self._top_k) > RECALL
        others = np.setdiff1d(np.arange(self._experts), ids)
        ids[wrong] = self._random.choice(others, int(wrong.sum()), replace=False)
        return ids
