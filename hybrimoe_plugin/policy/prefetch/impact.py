"""Impact-driven prefetching: send the expert whose presence shortens its layer most.

The impact of an expert is the drop of its layer's simulated makespan if it were resident.

Example: a transfer takes 40 us, the CPU 20 us a token, the accelerator 10 us an expert. The next
layer is predicted to need A (4 tokens, resident), B (3) and C (1), both offloaded; the layer after
it D (1, offloaded) alone.

                  next layer                            the one after it
    as it is      B crosses, C on the CPU      50 us    D on the CPU      20 us
    send B        A, B resident, C on the CPU  20 us    impact of B: 30 us
    then send C   all resident, C on the CPU   20 us    impact of C: none
    send D        D resident                   10 us    impact of D: 10 us

The order is B, then D. C is not sent: the CPU computes it while the accelerator is busy anyway.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, Routed
from hybrimoe_plugin.policy.prefetch.prediction import Prediction, PrefetchRequest
from hybrimoe_plugin.policy.schedule.machine_model import even_counts
from hybrimoe_plugin.policy.schedule.scheduler import Scheduler


class ImpactPrefetcher:
    """Highest impact first: the drop of a layer's simulated makespan if the expert were resident.

    Within a layer the heaviest offloaded expert has the highest impact, so one simulation per layer
    and one per choice suffice. Experts without impact are left where they are: the CPU hides them.
    The module's docstring has an example. Source: paper section 4.3.

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
        if room <= 0:
            return []
        heap: list[tuple[float, int, _Candidates]] = []
        for prediction in predictions:
            waiting = _waiting(prediction, self.calibrated, floor)
            if not waiting:
                continue
            scheduler = self._scheduler.for_rows(prediction.few)
            candidates = _Candidates(prediction, waiting, scheduler, self.calibrated)
            if candidates.advance():
                heap.append((-candidates.expected_us, prediction.distance, candidates))
        heapq.heapify(heap)
        chosen: list[PrefetchRequest] = []
        while heap and len(chosen) < room:
            _, distance, candidates = heapq.heappop(heap)
            chosen.append(candidates.request())
            if candidates.advance():
                heapq.heappush(heap, (-candidates.expected_us, distance, candidates))
        return chosen


class _Candidates:
    """One layer's candidates, each with the impact it has once those before it are resident.

    Args:
        waiting: their positions in the prediction, the first one last.
    """

    def __init__(
        self,
        prediction: Prediction,
        waiting: list[int],
        scheduler: Scheduler,
        calibrated: bool,
    ) -> None:
        self._prediction = prediction
        self._waiting = waiting
        self._scheduler = scheduler
        self._confidence = prediction.confidence if calibrated else None
        self._routed = list(prediction.routed)
        self._expert = -1
        self._impact_us = 0.0
        self._even = even_counts(self._routed)
        """Of an even call, as most are in decode, only counts have to be followed."""
        self._makespan_us = self._plan_us()

    @property
    def expected_us(self) -> float:
        """Impact of the present candidate, times its confidence where that counts."""
        if self._confidence is None:
            return self._impact_us
        return self._impact_us * self._confidence[self._expert]

    def request(self) -> PrefetchRequest:
        """The present candidate."""
        prediction = self._prediction
        ref = ExpertRef(prediction.layer, self._expert)
        confidence = 1.0 if self._confidence is None else self._confidence[self._expert]
        return PrefetchRequest(ref, prediction.distance, self._impact_us, confidence)

    def advance(self) -> bool:
        """Go to the next candidate; False when none is left that helps."""
        if not self._waiting:
            return False
        index = self._waiting.pop()
        item = self._routed[index]
        self._routed[index] = Routed(item.expert, item.load, 0.0)
        if self._even is not None:
            missing, present, load = self._even
            self._even = missing - 1, present + 1, load
        makespan_us = self._plan_us()
        self._expert = item.expert
        self._impact_us = self._makespan_us - makespan_us
        self._makespan_us = makespan_us
        return self._impact_us > 0.0

    def _plan_us(self) -> float:
        """Makespan of the call as it stands."""
        if self._even is not None:
            return self._scheduler.even_makespan_us(*self._even)
        return self._scheduler.makespan_us(self._routed)

    def __lt__(self, other: _Candidates) -> bool:
        return self._prediction.layer < other._prediction.layer


def _waiting(prediction: Prediction, calibrated: bool, floor: float) -> list[int]:
    """Positions of the offloaded experts, the heaviest last.

    Calibrated, loads are weighed by their probability, and experts below `floor` are left out.
    """
    routed, confidence = prediction.routed, prediction.confidence
    offloaded = [index for index, item in enumerate(routed) if item.ready_us == OFFLOADED]
    if not calibrated:
        return sorted(offloaded, key=lambda index: routed[index].load)
    sure = [index for index in offloaded if confidence[routed[index].expert] >= floor]
    if len(sure) > 1:
        sure.sort(key=lambda index: routed[index].load * confidence[routed[index].expert])
    return sure
