"""What the idle link loads ahead: experts that the routers of the next layers are predicted to choose."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from hybrimoe_plugin.config import PREFETCHERS
from hybrimoe_plugin.core import OFFLOADED, ExpertRef, Routed
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule import Scheduler


class Prediction(NamedTuple):
    """The predicted call of a later layer; `routed` carries loads and current residency."""

    layer: int
    distance: int
    """1 for the next MoE layer."""
    routed: tuple[Routed, ...]


class PrefetchRequest(NamedTuple):
    ref: ExpertRef
    impact_us: float
    """Predicted drop of that layer's makespan; 0 where the policy does not estimate it."""


class Prefetcher(Protocol):
    """Chooses transfers for the link's idle time."""

    def choose(self, predictions: Sequence[Prediction], idle_us: float) -> list[PrefetchRequest]:
        """Offloaded experts to send, most useful first, as many as fit into `idle_us`."""
        ...


class ImpactPrefetcher:
    """Highest impact first: the drop of a layer's simulated makespan if the expert were resident.

    Within a layer the heaviest offloaded expert has the highest impact, so one simulation per layer and one per choice
    suffice. Experts without impact are left where they are: the CPU hides them. Source: paper section 4.3.
    """

    def __init__(self, scheduler: Scheduler, costs: CostModel) -> None:
        self._scheduler = scheduler
        self._costs = costs

    def choose(self, predictions: Sequence[Prediction], idle_us: float) -> list[PrefetchRequest]:
        room = int(idle_us / self._costs.transfer_us) if self._costs.transfer_us > 0 else 0
        heap: list[tuple[float, int, _Chain]] = []
        for prediction in predictions if room else ():
            chain = _Chain(prediction, self._scheduler)
            if chain.advance():
                heapq.heappush(heap, (-chain.impact_us, prediction.distance, chain))
        chosen: list[PrefetchRequest] = []
        while heap and len(chosen) < room:
            _, distance, chain = heapq.heappop(heap)
            chosen.append(PrefetchRequest(ExpertRef(chain.layer, chain.expert), chain.impact_us))
            if chain.advance():
                heapq.heappush(heap, (-chain.impact_us, distance, chain))
        return chosen


class _Chain:
    """One layer's candidates, heaviest first, each with the impact it has once those before it are resident."""

    def __init__(self, prediction: Prediction, scheduler: Scheduler) -> None:
        self.layer = prediction.layer
        self.expert = -1
        self.impact_us = 0.0
        self._scheduler = scheduler
        self._routed = list(prediction.routed)
        self._queue = [index for index, item in enumerate(self._routed) if item.ready_us == OFFLOADED]
        self._queue.sort(key=lambda index: self._routed[index].load)
        self._makespan_us = scheduler.plan(self._routed).makespan_us if self._queue else 0.0

    def advance(self) -> bool:
        """Go to the next candidate; False when none is left that helps."""
        if not self._queue:
            return False
        index = self._queue.pop()
        self._routed[index] = self._routed[index]._replace(ready_us=0.0)
        makespan_us = self._scheduler.plan(self._routed).makespan_us
        self.expert = self._routed[index].expert
        self.impact_us = self._makespan_us - makespan_us
        self._makespan_us = makespan_us
        return self.impact_us > 0.0

    def __lt__(self, other: _Chain) -> bool:
        return self.layer < other.layer


class ScorePrefetcher:
    """Nearest layer first, heaviest predicted load first; no simulation (the plain twin of impact)."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def choose(self, predictions: Sequence[Prediction], idle_us: float) -> list[PrefetchRequest]:
        room = int(idle_us / self._costs.transfer_us) if self._costs.transfer_us > 0 else 0
        candidates = [
            (prediction.distance, -item.load, ExpertRef(prediction.layer, item.expert))
            for prediction in predictions
            for item in prediction.routed
            if item.ready_us == OFFLOADED
        ]
        return [PrefetchRequest(ref, 0.0) for _, _, ref in sorted(candidates)[:room]]


def make_prefetcher(name: str, scheduler: Scheduler, costs: CostModel) -> Prefetcher | None:
    """The prefetcher of that name, None for `off`.

    Raises:
        ConfigError: unknown name.
    """
    if name not in PREFETCHERS:
        raise ConfigError(f"prefetch: expected one of {', '.join(PREFETCHERS)}, found {name!r}")
    if name == "off":
        return None
    return ImpactPrefetcher(scheduler, costs) if name == "impact" else ScorePrefetcher(costs)
