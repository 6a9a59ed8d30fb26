"""Cache fills: experts that the CPU computed are brought into the cache while the link is idle.

As in a processor's cache, a *fill* loads what was just missed, for the next token. It differs from
a demand load, which the running call waits for, and from a prefetch, which a prediction asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.link_time import LinkTime
from hybrimoe_plugin.policy.prefetch.prediction import Prediction
from hybrimoe_plugin.policy.residency import SAFE, Residency
from hybrimoe_plugin.policy.step import IdleTime, Lenders, Move, Step
from hybrimoe_plugin.policy.transfer_gain import TransferGain


class CacheFill:
    """Sends fills for the running layer, and in decode those that a prompt had no time for.

    Args:
        residency: gives fills their slots.
        link: carries them.
        gain: weighs those that end late.
        counters: where fills are counted.
    """

    def __init__(
        self, residency: Residency, link: LinkTime, gain: TransferGain, counters: Counters
    ) -> None:
        self.postponed: dict[int, list[int]] = {}
        """Layer -> experts that the CPU computed in a prompt and that the link had no time for."""
        self._residency = residency
        self._link = link
        self._gain = gain
        self._counters = counters

    def send(self, step: Step, predictions: Sequence[Prediction], idle: IdleTime) -> list[Move]:
        """Fill the cache with misses of this call, the most likely ones first.

        Args:
            predictions: of the next layers, which a late fill would delay.
        """
        if not (step.plan.cpu or step.many or self.postponed):
            return []
        layer = step.layer
        missed = self._missing(layer, step.plan.cpu)
        moves = self._send_missed(step, missed, predictions, idle)
        if step.many:
            self.postponed[layer] = self._missing(layer, missed)
        elif self.postponed and self._residency.cache.probabilities:
            # The next layers' first: they are there before the token that needs them.
            layers = len(self._residency.worth)
            order = sorted(self.postponed, key=lambda other: (other - layer - 1) % layers)
            for later in order:
                moves += self.make_up(step, later, idle)
        self._counters.fills += len(moves)
        return moves

    def make_up(self, step: Step, layer: int, idle: IdleTime) -> list[Move]:
        """Fills of one layer that a prompt had no time for, each once.

        Where a prompt prefetched more, it filled less.

        Args:
            step: the running call.
            layer: whose fills to send.
        """
        moves: list[Move] = []
        residency = self._residency
        lenders = residency.lenders(step.layer, step.many, step.few)
        ranks = residency.cache.ranks[layer]
        left = self.postponed.pop(layer, [])
        left.sort(key=lambda expert: ranks[expert])
        while left and self._link.end_us(idle) <= idle.until_us:
            expert = left.pop()
            if residency.pool.slot_of(layer, expert) is not None:
                continue
            victim = residency.replaced(layer, lenders)
            most = SAFE * ranks[expert]
            if victim is not None and residency.worth[victim] >= most:
                return moves
            slot = residency.admit(layer, expert, lenders)
            if slot is None:
                return moves
            moves.append(self._send(layer, expert, slot, idle))
        if left:
            self.postponed[layer] = left
        return moves

    def clear(self) -> None:
        """Forget what prompts had no time for."""
        self.postponed.clear()

    def _missing(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of a layer's experts that have no slot, but could."""
        pool = self._residency.pool
        if layer in pool.on_cpu:
            return []
        slot_of = pool.slot_of
        return [expert for expert in experts if slot_of(layer, expert) is None]

    def _send_missed(
        self,
        step: Step,
        missed: Sequence[int],
        predictions: Sequence[Prediction],
        idle: IdleTime,
    ) -> list[Move]:
        """Fills of this call's misses, best ranked first, while they pay."""
        moves: list[Move] = []
        layer = step.layer
        lenders = self._residency.lenders(layer, step.many, step.few)
        ranks = self._residency.cache.ranks[layer]
        best_first = sorted(missed, key=lambda expert: -ranks[expert])
        for expert in best_first:
            if self._link.free_us >= idle.until_us:
                break
            if not self._pays(step, expert, lenders, predictions, idle):
                break
            slot = self._residency.admit(layer, expert, lenders)
            if slot is not None:
                moves.append(self._send(layer, expert, slot, idle))
        return moves

    def _pays(
        self,
        step: Step,
        expert: int,
        lenders: Lenders,
        predictions: Sequence[Prediction],
        idle: IdleTime,
    ) -> bool:
        """Whether a fill that ends late gains more than it delays."""
        late_us = self._link.end_us(idle) - idle.until_us
        if late_us <= 0.0:
            return True
        if step.many:
            return False  # A call of many tokens must not wait for the sake of later ones.
        gain_us = self._gain.fill_us(step.layer, expert, lenders)
        if gain_us <= 0.0:
            return False
        delay_us = self._gain.delay_us(step, predictions, late_us, most_us=gain_us)
        return gain_us > delay_us

    def _send(self, layer: int, expert: int, slot: int, idle: IdleTime) -> Move:
        """Queue the transfer of an expert that has a cache slot."""
        move = self._link.send(layer, expert, slot, idle.now_us)
        self._residency.expect(move)
        return move
