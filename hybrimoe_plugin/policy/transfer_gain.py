"""What a transfer in idle link time gains, and what it costs the calls that then wait for it.

Gains are differences of predicted makespans. A transfer that ends before the next layer begins
costs nothing. One that ends later delays every call that wants the link in the meantime.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_plugin.core import Routed
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.link_time import LinkTime
from hybrimoe_plugin.policy.prefetch.prediction import Prediction, PrefetchRequest
from hybrimoe_plugin.policy.residency import KEPT, Residency
from hybrimoe_plugin.policy.schedule.scheduler import Schedulers
from hybrimoe_plugin.policy.step import IdleTime, Lenders, Step


class TransferGain:
    """Weighs transfers for the time from one layer call to the next.

    Args:
        calibrated: whether prefetches are weighed by confidence (ours); else, as published, they
            are sent only while the link would be idle.
    """

    def __init__(
        self,
        residency: Residency,
        link: LinkTime,
        schedulers: Schedulers,
        costs: CostModel,
        calibrated: bool,
    ) -> None:
        self._residency = residency
        self._link = link
        self._schedulers = schedulers
        self._costs = costs
        self._calibrated = calibrated

    def prefetch_us(
        self,
        step: Step,
        predictions: Sequence[Prediction],
        idle: IdleTime,
        request: PrefetchRequest,
    ) -> float:
        """Expected gain of a prefetch, less what it costs where it ends late.

        Returns:
            Microseconds; infinite where it costs nothing and its impact is not known.
        """
        sure = request.confidence
        late_us = self._link.end_us(idle) - idle.until_us
        if late_us <= 0.0:
            return sure * request.impact_us if request.impact_us else KEPT
        layer_us = self._link.layer_us
        if not self._calibrated or layer_us <= 0.0:
            return 0.0
        before = request.distance - 1
        delay_us = self.delay_us(step, predictions, late_us, before)
        late_us -= before * layer_us
        if late_us <= 0.0:
            return sure * request.impact_us - delay_us
        # It arrives while its own layer already runs: still sooner than a demand load would.
        makespan_us = self._schedulers.for_call(step.many).for_rows(step.few).makespan_us
        routed = predictions[before].routed
        coming = with_arrival(routed, request.ref.expert, late_us)
        now = makespan_us(routed, max(0.0, late_us - self._costs.transfer_us))
        right = makespan_us(coming, late_us)
        wrong = makespan_us(routed, late_us)
        # The sooner its layer is done, the sooner the layers behind it may want a link that is
        # still busy.
        after_us = late_us - right - self._costs.between_layers_us
        delay_us += self.delay_us(step, predictions[request.distance :], after_us)
        return now - sure * right - (1.0 - sure) * wrong - delay_us

    def fill_us(self, layer: int, expert: int, lenders: Lenders) -> float:
        """What the next token gains by having one expert in the cache instead of its victim."""
        residency = self._residency
        if not residency.cache.probabilities:
            return 0.0
        victim = residency.replaced(layer, lenders)
        lost = 0.0 if victim is None else float(residency.worth[victim])
        return (float(residency.cache.ranks[layer, expert]) - lost) * self._costs.miss_us

    def delay_us(
        self,
        step: Step,
        predictions: Sequence[Prediction],
        late_us: float,
        layers: int | None = None,
        most_us: float = KEPT,
    ) -> float:
        """What the next layers lose if one more transfer keeps the link busy.

        Args:
            step: the running call; stands for the next layers where no prediction is trusted.
            predictions: of the next layers, nearest first.
            late_us: how far into the next layers' time the link stays busy.
            layers: how many layers count; None for all.
            most_us: a loss beyond which nobody cares how great it is.
        """
        known = [item.routed for item in predictions if item.trusted]
        if not known:
            known = [step.routed]
        makespan_us = self._schedulers.for_call(step.many).for_rows(step.few).makespan_us
        transfer_us = self._costs.transfer_us
        layer_us = self._link.layer_us
        demand_share = self._link.demand_share[step.many]
        lost_us, distance = 0.0, 0
        while late_us > 0.0 and (layers is None or distance < layers) and lost_us <= most_us:
            routed = known[min(distance, len(known) - 1)]
            free_us = max(0.0, late_us - transfer_us)
            predicted_us = 0.0
            if routed:  # else all have slots, and the call wants nothing of the link
                predicted_us = makespan_us(routed, late_us) - makespan_us(routed, free_us)
            # Predictions err: at least the usual share of calls will want the link.
            usual_us = demand_share * (late_us - free_us)
            lost_us += max(predicted_us, usual_us)
            late_us -= layer_us
            distance += 1
        return lost_us


def with_arrival(routed: Sequence[Routed], expert: int, ready_us: float) -> list[Routed]:
    """The same call with one of its experts arriving at `ready_us`."""
    return [
        Routed(expert, item.load, ready_us) if item.expert == expert else item for item in routed
    ]
