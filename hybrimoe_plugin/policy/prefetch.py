"""What the idle link loads ahead: experts that the routers of the next layers are predicted to
choose.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from hybrimoe_plugin.config import PREFETCHERS
from hybrimoe_plugin.core import OFFLOADED, ExpertRef, Routed
from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.schedule import Scheduler

DOUBTFUL = 0.6
"""Predictions less likely than this would waste more transfers than they save; see `Controller`."""


class Prediction(NamedTuple):
    """The predicted call of a later layer; `routed` carries loads and current residency."""

    layer: int
    distance: int
    """1 for the next MoE layer."""
    routed: tuple[Routed, ...]
    confidence: Mapping[int, float]
    """Expert -> measured share of such predictions that come true."""


class PrefetchRequest(NamedTuple):
    ref: ExpertRef
    distance: int
    impact_us: float
    """Predicted drop of that layer's makespan; 0 where the policy does not estimate it."""
    confidence: float


class Prefetcher(Protocol):
    """Chooses transfers for the link's idle time."""

    calibrated: bool
    """Whether requests are weighed by measured confidence; otherwise predictions are taken as true.
    """

    def choose(
        self, predictions: Sequence[Prediction], room: int, floor: float = 0.0
    ) -> list[PrefetchRequest]:
        """At most `room` offloaded experts to send, most useful first; calibrated ones of at least
        `floor`.
        """
        ...


class ImpactPrefetcher:
    """Highest impact first: the drop of a layer's simulated makespan if the expert were resident.

    Within a layer the heaviest offloaded expert has the highest impact, so one simulation per layer
    and one per choice suffice. Experts without impact are left where they are: the CPU hides them.
    Source: paper section 4.3.

    Args:
        calibrated: weigh impact by the measured confidence of a prediction (ours); else as
            published.
    """

    def __init__(self, scheduler: Scheduler, calibrated: bool = False) -> None:
        self._scheduler = scheduler
        self.calibrated = calibrated

    def choose(
        self, predictions: Sequence[Prediction], room: int, floor: float = 0.0
    ) -> list[PrefetchRequest]:
        heap: list[tuple[float, int, _Chain]] = []
        for prediction in predictions if room > 0 else ():
            chain = _Chain(prediction, self._scheduler, self.calibrated, floor)
            if chain.advance():
                heapq.heappush(heap, (-chain.expected_us, prediction.distance, chain))
        chosen: list[PrefetchRequest] = []
        while heap and len(chosen) < room:
            _, distance, chain = heapq.heappop(heap)
            chosen.append(chain.request())
            if chain.advance():
                heapq.heappush(heap, (-chain.expected_us, distance, chain))
        return chosen


class _Chain:
    """One layer's candidates, each with the impact it has once those before it are resident.

    The heaviest come first; calibrated, loads count by their probability and those below `floor`
    not at all.
    """

    def __init__(
        self, prediction: Prediction, scheduler: Scheduler, calibrated: bool, floor: float
    ) -> None:
        self._prediction = prediction
        self._calibrated = calibrated
        self._expert = -1
        self._impact_us = 0.0
        self._scheduler = scheduler
        self._routed = routed = list(prediction.routed)
        self._queue = [index for index, item in enumerate(routed) if item.ready_us == OFFLOADED]
        if calibrated:
            sure = prediction.confidence
            self._queue = [index for index in self._queue if sure[routed[index].expert] >= floor]
            self._queue.sort(key=lambda index: routed[index].load * sure[routed[index].expert])
        else:
            self._queue.sort(key=lambda index: routed[index].load)
        self._makespan_us = scheduler.plan(routed).makespan_us if self._queue else 0.0

    @property
    def expected_us(self) -> float:
        return (
            self._impact_us * self._prediction.confidence[self._expert]
            if self._calibrated
            else self._impact_us
        )

    def request(self) -> PrefetchRequest:
        prediction = self._prediction
        ref = ExpertRef(prediction.layer, self._expert)
        confidence = prediction.confidence[self._expert] if self._calibrated else 1.0
        return PrefetchRequest(ref, prediction.distance, self._impact_us, confidence)

    def advance(self) -> bool:
        """Go to the next candidate; False when none is left that helps."""
        if not self._queue:
            return False
        index = self._queue.pop()
        self._routed[index] = self._routed[index]._replace(ready_us=0.0)
        makespan_us = self._scheduler.plan(self._routed).makespan_us
        self._expert = self._routed[index].expert
        self._impact_us = self._makespan_us - makespan_us
        self._makespan_us = makespan_us
        return self._impact_us > 0.0

    def __lt__(self, other: _Chain) -> bool:
        return self._prediction.layer < other._prediction.layer


class ScorePrefetcher:
    """Nearest layer first, heaviest predicted load first; no simulation (the plain twin of
    impact).
    """

    calibrated = False

    def choose(
        self, predictions: Sequence[Prediction], room: int, floor: float = 0.0
    ) -> list[PrefetchRequest]:
        candidates = [
            (prediction.distance, -item.load, ExpertRef(prediction.layer, item.expert))
            for prediction in predictions
            for item in prediction.routed
            if item.ready_us == OFFLOADED
        ]
        chosen = sorted(candidates)[:room]
        return [PrefetchRequest(ref, distance, 0.0, 1.0) for distance, _, ref in chosen]


def make_prefetcher(name: str, scheduler: Scheduler, costs: CostModel) -> Prefetcher | None:
    """The prefetcher of that name, None for `off`.

    Raises:
        ConfigError: unknown name.
    """
    if name not in PREFETCHERS:
        raise ConfigError(f"prefetch: expected one of {', '.join(PREFETCHERS)}, found {name!r}")
    if name == "off":
        return None
    return (
        ScorePrefetcher()
        if name == "score"
        else ImpactPrefetcher(scheduler, calibrated=name == "expected")
    )
