"""What the link does while it would be idle: prefetches first, then fills.

A prefetch goes where its expected gain, impact times measured confidence, exceeds what its slot
loses and what its transfer delays. Doubtful predictions, less likely than not, are tried only while
enough prefetches have been used, and only where they are in nobody's way. Source: paper section 4.3
(impact); the rest is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hybrimoe_plugin.core import ExpertRef, Routed
from hybrimoe_plugin.policy.link_time import Idle, LinkTime
from hybrimoe_plugin.policy.prefetch import DOUBTFUL, Prediction
from hybrimoe_plugin.policy.residency import KEPT, Ahead, Move, Step

USED_SHARE = 0.65
"""Share of recent prefetches in decode that must have been needed before doubtful ones are tried.
"""
RARE = 0.1
"""Share of calls with demand loads up to which the link counts as free."""
SLACK = 0.05
"""How sure these must be."""
FADE = 0.998
"""What is left of old prefetches in that share when one more is sent: of 500 remembered ones the
credit is little.
"""
CREDIT = 4.0
"""Prefetches in spare time that may be tried before any was used."""
SAFE = 0.5
"""Share of a newcomer's confidence below which the worth of what it replaces must lie."""


class IdleLink(LinkTime):
    """Chooses transfers for the time from one layer call to the next."""

    def _predictions(
        self, step: Step, predicted: Iterable[tuple[int, Mapping[int, int]]], idle: Idle
    ) -> list[Prediction]:
        """The later layers as they will stand at their own start if nothing more is sent.

        Predicted experts that are there are kept until their layer has run.
        """
        if self.prefetcher is None:
            return []
        found = []
        for distance, (layer, loads) in enumerate(predicted, 1):
            start_us = self._start_us(distance, idle)
            routed = tuple(
                Routed(e, load, self._ready_us(layer, e, start_us)) for e, load in loads.items()
            )
            confidence = self.confidence.predicted(layer, distance, routed, step.tokens > 1)
            found.append(Prediction(layer, distance, routed, confidence))
            row = self._worth[layer]
            for item in routed:
                if row[item.expert] != KEPT:
                    row[item.expert] = (
                        max(row[item.expert], confidence[item.expert])
                        if self.cache.probabilities
                        else KEPT
                    )
        return found

    def _prefetch(self, step: Step, predictions: list[Prediction], idle: Idle) -> list[Move]:
        """Send what the prefetcher chooses and what then still is worth it. Mutates
        `predictions`.
        """
        if self.prefetcher is None or not predictions:
            return []
        moves: list[Move] = []
        lenders = self._lenders(step.layer, step.tokens)
        alone = step.tokens == 1
        for request in self.prefetcher.choose(
            predictions, self._room(idle), self._floor() if alone else SLACK
        ):
            if self.link_free_us >= idle.until_us:
                break  # It would not start before the next call, which knows better what it wants.
            layer, expert = request.ref
            if (
                alone
                and request.confidence < DOUBTFUL
                and not self._may_doubt(request.distance, idle)
            ):
                continue
            gain_us = self._gain_us(step, predictions, idle, request)
            if gain_us <= 0.0:
                continue
            take = self._borrow if self._in_a_row else self._admit
            slot = take(layer, expert, lenders, gain_us)
            if slot is not None:
                moves.append(self._sent_ahead(layer, expert, slot, request.distance, step, idle))
                predictions[request.distance - 1] = self._coming(
                    predictions[request.distance - 1], moves[-1], idle
                )
        if alone and self.prefetcher.calibrated:
            moves += self._spare(step, predictions[0], lenders, idle)
        self.counters.prefetches += len(moves)
        return moves

    def _spare(self, step: Step, prediction: Prediction, lenders: range, idle: Idle) -> list[Move]:
        """Prefetches for the next layer in time that nobody else wants: those without impact or of
        little confidence.

        Alone the CPU would hide such a miss, but predictions err, and then two meet. Each must be
        clearly likelier to be used than what it replaces. Predictions from further away wait for
        the next layer's, which is better.
        """
        moves: list[Move] = []
        layer, sure = prediction.layer, prediction.confidence
        for expert in sorted(sure, key=lambda expert: -sure[expert]):
            if self._end_us(idle) > idle.until_us:
                break
            if sure[expert] < self._floor(CREDIT):
                break
            if self.pool.slot_of(layer, expert) is not None:
                continue
            victim = None if self.pool.has_room(layer) else self._victim(layer, lenders)
            if victim is not None and self._worth[victim] >= SAFE * sure[expert]:
                break
            slot = self._admit(layer, expert, lenders, KEPT)
            if slot is None:
                break
            moves.append(self._sent_ahead(layer, expert, slot, prediction.distance, step, idle))
        return moves

    def _sent_ahead(
        self, layer: int, expert: int, slot: int, distance: int, step: Step, idle: Idle
    ) -> Move:
        alone = step.tokens == 1
        self._unused[ExpertRef(layer, expert)] = Ahead(distance, alone)
        self.by_distance.setdefault(distance, [0, 0])[0] += 1
        if alone:
            self._issued = self._issued * FADE + 1.0
            self._used *= FADE
        return self._send(layer, expert, slot, idle.now_us, cached=True)

    def _coming(self, prediction: Prediction, move: Move, idle: Idle) -> Prediction:
        """The prediction, knowing that one of its experts is now under way: the next one is weighed
        beside it.
        """
        ready_us = max(0.0, move.end_us - self._start_us(prediction.distance, idle))
        routed = [
            i._replace(ready_us=ready_us) if i.expert == move.expert else i
            for i in prediction.routed
        ]
        return prediction._replace(routed=tuple(routed))

    def _may_doubt(self, distance: int, idle: Idle) -> bool:
        """Whether a doubtful prefetch may be sent now: not before better predictions will be there,
        nor into the way.

        A transfer that easily fits into one layer's time waits for the prediction of the next
        layer. One that ends late is sent only where hardly any call wants the link.
        """
        if distance > 1 and self.costs.transfer_us < 0.8 * self._layer_us:
            return False
        return self._end_us(idle) <= idle.until_us or self._demand[False] < RARE

    def _floor(self, credit: float = 0.0) -> float:
        """How sure a prediction for one token must be.

        Doubtful ones are tried while enough were used so far. Else the rest must be sure, and the
        surer the fewer were used: what is chosen comes true less often than its kind.
        """
        if self._used + credit > USED_SHARE * self._issued:
            return SLACK
        share = (self._used + CREDIT) / (self._issued + CREDIT)
        return max(DOUBTFUL, 2.0 * USED_SHARE - share)

    def _fill(self, step: Step, predictions: Sequence[Prediction], idle: Idle) -> list[Move]:
        """Bring misses that the CPU computed into the cache while the link is idle, the most likely
        ones first.
        """
        moves: list[Move] = []
        lenders = self._lenders(step.layer, step.tokens)
        ranks = self.cache.ranks[step.layer]
        missed = [
            expert for expert in step.plan.cpu if self.pool.slot_of(step.layer, expert) is None
        ]
        for expert in sorted(missed, key=lambda expert: -ranks[expert]):
            if self.link_free_us >= idle.until_us:
                break
            late_us = self._end_us(idle) - idle.until_us
            if late_us > 0.0:
                # A call of many tokens must not wait for the sake of later ones.
                gain_us = (
                    self._fill_gain_us(step.layer, expert, lenders) if step.tokens == 1 else 0.0
                )
                if gain_us <= 0.0 or gain_us <= self._loss_us(step, predictions, idle, late_us):
                    break
            slot = self._admit(step.layer, expert, lenders)
            if slot is not None:
                moves.append(self._send(step.layer, expert, slot, idle.now_us, cached=True))
        if step.tokens > 1:
            self._postponed[step.layer] = [
                e for e in missed if self.pool.slot_of(step.layer, e) is None
            ]
        elif self._postponed and self.cache.probabilities:
            # The next layers' first: they are there before the token that needs them.
            for layer in sorted(
                self._postponed, key=lambda layer: (layer - step.layer - 1) % len(self._worth)
            ):
                moves += self._make_up(layer, lenders, idle)
        self.counters.fills += len(moves)
        return moves

    def _make_up(self, layer: int, lenders: range, idle: Idle) -> list[Move]:
        """Fills that a prompt had no time for, each once: where it prefetched more, it
        filled less.
        """
        moves: list[Move] = []
        ranks, left = self.cache.ranks[layer], self._postponed.pop(layer, [])
        left.sort(key=lambda expert: ranks[expert])
        while left and self._end_us(idle) <= idle.until_us:
            expert = left.pop()
            if self.pool.slot_of(layer, expert) is not None:
                continue
            victim = None if self.pool.has_room(layer) else self._victim(layer, lenders)
            if victim is not None and self._worth[victim] >= SAFE * ranks[expert]:
                return moves
            slot = self._admit(layer, expert, lenders)
            if slot is None:
                return moves
            moves.append(self._send(layer, expert, slot, idle.now_us, cached=True))
        if left:
            self._postponed[layer] = left
        return moves
