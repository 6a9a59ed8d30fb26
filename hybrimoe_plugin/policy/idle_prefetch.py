"""Which predicted experts to send while the link would be idle.

A prefetch is sent where its expected gain, impact times measured confidence, exceeds what its slot
loses and what its transfer delays. Doubtful predictions, less likely than not, are tried only while
enough prefetches have been used, and only where they delay nothing. Source: paper section 4.3
(impact); the rest is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_plugin.core import OFFLOADED, ExpertRef
from hybrimoe_plugin.policy.link_time import LinkTime
from hybrimoe_plugin.policy.prefetch.confidence import Confidence
from hybrimoe_plugin.policy.prefetch.prediction import Prediction, Prefetcher, PrefetchRequest
from hybrimoe_plugin.policy.prefetch.record import CREDIT, DOUBTFUL, SLACK, PrefetchRecord
from hybrimoe_plugin.policy.prompt_slots import PromptSlots
from hybrimoe_plugin.policy.residency import KEPT, SAFE, Residency
from hybrimoe_plugin.policy.slot_loans import SlotLoans
from hybrimoe_plugin.policy.step import IdleTime, Lenders, Move, Predicted, Step
from hybrimoe_plugin.policy.transfer_gain import TransferGain, with_arrival

RARE = 0.1
"""Share of calls with demand loads up to which the link counts as free."""
EASY = 0.8
"""Share of a layer's time below which a transfer easily fits into it."""


class IdlePrefetch:
    """Chooses prefetches for the time from one layer call to the next.

    Args:
        prefetcher: proposes them; None for no prefetching.
        record: what became of earlier ones.
        residency: gives them their slots.
        link: carries them.
        gain: weighs them.
        loans: gives them slots of other layers in a streak of prompts.
        prompt_slots: gives them staging slots in any prompt.
    """

    def __init__(
        self,
        prefetcher: Prefetcher | None,
        record: PrefetchRecord,
        residency: Residency,
        link: LinkTime,
        gain: TransferGain,
        loans: SlotLoans,
        prompt_slots: PromptSlots,
    ) -> None:
        self.confidence = Confidence()
        self._prefetcher = prefetcher
        self._record = record
        self._residency = residency
        self._link = link
        self._gain = gain
        self._loans = loans
        self._prompt_slots = prompt_slots

    def needs_nothing(self, step: Step, predicted: Predicted) -> bool:
        """Whether a token has missed nothing here and is predicted to miss nothing further on.

        Then nothing is to be sent, and what is predicted is not protected from eviction either:
        hardly any call evicts, and no replay took longer (`docs/LOG.md`).
        """
        if step.many or step.plan.cpu or step.moves:
            return False
        cached = self._residency.pool.cached
        return all(loads.keys() <= cached[layer].keys() for layer, loads in predicted)

    def predict(self, step: Step, predicted: Predicted, idle: IdleTime) -> list[Prediction]:
        """The later layers as they will stand at their own start if nothing more is sent.

        Predicted experts that are there are kept until their layer has run. Not for one token where
        layers share slots: an eviction hardly ever takes what the next layers need, and no replay
        took longer (`docs/LOG.md`). Then only predictions of offloaded experts are followed.

        Args:
            predicted: (layer, expert -> predicted load) of the next layers, nearest first.
        """
        if self._prefetcher is None:
            return []
        residency = self._residency
        offloaded_only = residency.pool.shared and not step.many
        found = []
        for distance, (layer, loads) in enumerate(predicted, 1):
            if offloaded_only and loads.keys() <= residency.pool.cached[layer].keys():
                found.append(Prediction(layer, distance, (), {}))
                continue
            start_us = self._link.layer_start_us(distance, idle)
            routed = residency.routed(layer, loads, start_us)
            confidence = self.confidence.predicted(
                layer, distance, routed, step.many, offloaded_only, step.few
            )
            found.append(Prediction(layer, distance, routed, confidence, step.few))
            if not offloaded_only:
                residency.protect(layer, confidence)
        return found

    def send(self, step: Step, predictions: list[Prediction], idle: IdleTime) -> list[Move]:
        """Send what the prefetcher chooses and what then is still worth it.

        Mutates `predictions`: experts that are sent have their arrival there.
        """
        if self._prefetcher is None or not predictions:
            return []
        on_cpu = self._residency.pool.on_cpu
        wanting = [
            item for item in predictions if item.layer not in on_cpu and _is_missing_some(item)
        ]
        if not wanting:
            return []
        moves: list[Move] = []
        floor = self._least_confidence(step)
        for request in self._prefetcher.choose(wanting, self._link.room(idle), floor):
            if self._link.free_us >= idle.until_us:
                break  # It would not start before the next call, which knows what it needs.
            move = self._send_request(step, predictions, idle, request)
            if move is None:
                continue
            moves.append(move)
            # The next request is weighed knowing that this one is under way.
            place = request.distance - 1
            predictions[place] = self._with_move(predictions[place], move, idle)
        if self._prefetcher.calibrated and not step.many and predictions[0].layer not in on_cpu:
            moves += self._send_spare(step, predictions[0], idle)
        return moves

    def stale(self, step: Step) -> list[tuple[int, int]]:
        """(expert, slot) of prefetches for the running layer that it does not need after all.

        Only those that are still in flight.
        """
        layer = step.layer
        coming = self._record.among(self._residency.arriving(layer), layer)
        if not coming:
            return []
        needed = {item.expert for item in step.routed}
        cached = self._residency.pool.cached[layer]
        return [(expert, cached[expert]) for expert in coming if expert not in needed]

    def withdraw(self, ref: ExpertRef) -> None:
        """Forget a prefetch that the link never carried: its slot is free again."""
        self._residency.withdraw(ref)
        self._record.withdraw(ref)
        self._link.withdraw()

    def _send_request(
        self,
        step: Step,
        predictions: Sequence[Prediction],
        idle: IdleTime,
        request: PrefetchRequest,
    ) -> Move | None:
        """Send one request if it is worth its slot and its time; None if not."""
        if not step.many and not self._may_try(request, idle):
            return None
        gain_us = self._gain.prefetch_us(step, predictions, idle, request)
        if gain_us <= 0.0:
            return None
        slot = self._prompt_slots.lend(*request.ref) if step.many else None
        if slot is None:
            lenders = self._lenders(step, idle, request)
            take_slot = self._loans.borrow if self._loans.active else self._residency.admit
            slot = take_slot(*request.ref, lenders, gain_us)
        if slot is None:
            return None
        return self._send(request.ref, slot, request.distance, step, idle)

    def _least_confidence(self, step: Step, credit: float = 0.0) -> float:
        """How sure a prediction must be to be sent.

        Only for a single token it follows what became of earlier prefetches. A call of a few rows
        needs several times as many experts: more of its misses stay unhidden, and an attempt that
        delays nothing pays even if most of them fail.
        """
        if step.many or step.few:
            return SLACK
        return self._record.least_confidence(credit)

    def _lenders(self, step: Step, idle: IdleTime, request: PrefetchRequest) -> Lenders:
        """Layers that may lose a slot to a prefetch.

        In a crowded call of a few rows, every layer is about to need most of what it has, and a
        late transfer takes the time of a demand load: it only moves a miss from one layer to
        another. Such a prefetch may only even out what layers hold.
        """
        lenders = self._residency.lenders(step.layer, step.many, step.few)
        if step.few and step.crowded:
            start_us = self._link.layer_start_us(request.distance, idle)
            if self._link.end_us(idle) > start_us:
                return self._residency.above_quota(lenders)
        return lenders

    def _send_spare(self, step: Step, prediction: Prediction, idle: IdleTime) -> list[Move]:
        """Use leftover link time for prefetches of the next layer without impact or confidence.

        The CPU would hide a single miss of this kind, but predictions err, and two misses in one
        call are not hidden. Each must be clearly likelier to be used than what it replaces.
        Predictions over longer distances wait: the next layer's prediction will be better.
        """
        moves: list[Move] = []
        residency = self._residency
        lenders = residency.lenders(step.layer, step.many, step.few)
        layer, confidence = prediction.layer, prediction.confidence
        cached = residency.pool.cached[layer]
        if confidence.keys() <= cached.keys():
            return []
        for expert in sorted(confidence, key=lambda expert: -confidence[expert]):
            sure = confidence[expert]
            if self._link.end_us(idle) > idle.until_us:
                break
            if sure < self._least_confidence(step, CREDIT):
                break
            if expert in cached:
                continue
            victim = residency.replaced(layer, lenders)
            most = SAFE * sure
            if victim is not None and residency.worth[victim] >= most:
                break
            slot = residency.admit(layer, expert, lenders, KEPT)
            if slot is None:
                break
            ref = ExpertRef(layer, expert)
            moves.append(self._send(ref, slot, prediction.distance, step, idle))
        return moves

    def _send(self, ref: ExpertRef, slot: int, distance: int, step: Step, idle: IdleTime) -> Move:
        self._record.send(ref, distance, decode=not (step.many or step.few))
        move = self._link.send(ref.layer, ref.expert, slot, idle.now_us)
        self._residency.expect(move)
        return move

    def _with_move(self, prediction: Prediction, move: Move, idle: IdleTime) -> Prediction:
        """The prediction, with one of its experts under way."""
        start_us = self._link.layer_start_us(prediction.distance, idle)
        ready_us = max(0.0, move.end_us - start_us)
        routed = with_arrival(prediction.routed, move.expert, ready_us)
        return prediction._replace(routed=tuple(routed))

    def _may_try(self, request: PrefetchRequest, idle: IdleTime) -> bool:
        """Whether a prefetch for one token may be sent now.

        A doubtful one waits for a better prediction where a transfer easily fits into one layer's
        time, and must delay nothing: it is sent late only where hardly any call wants the link.
        """
        link = self._link
        if request.confidence >= DOUBTFUL:
            return True
        if request.distance > 1 and link.transfer_us < EASY * link.layer_us:
            return False
        if link.end_us(idle) <= idle.until_us:
            return True
        return link.demand_share[False] < RARE


def _is_missing_some(prediction: Prediction) -> bool:
    """Whether an expert of the predicted call is offloaded."""
    return OFFLOADED in [item.ready_us for item in prediction.routed]
