"""When the link is free, and how busy layer calls usually keep it."""

from __future__ import annotations

from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.step import IdleTime, Move

LAYER_STEP = 0.1
"""Weight of the newest layer in the average time from one layer to the next: a memory of about ten
layers, so that it has followed within one pass when the kind of call changes.
"""
DEMAND_STEP = 0.02
"""Weight of the newest call in the share of calls with demand loads: a memory of about fifty calls,
that is one or two passes.
"""
LATE_PREFETCHES = 2
"""Prefetches that may be chosen beyond what fits the idle time: they end late."""


class LinkTime:
    """The queue of transfers, on the caller's clock in microseconds.

    Args:
        expert_bytes: bytes of one expert, for the counters.
    """

    def __init__(self, costs: CostModel, counters: Counters, expert_bytes: int) -> None:
        self._costs = costs
        self._counters = counters
        self._expert_bytes = expert_bytes
        self.free_us = 0.0
        """When the link has delivered everything it was given."""
        self.layer_us = 0.0
        """Moving average of the time from one layer to the next; 0 before the first."""
        self.demand_share = [1.0, 1.0]
        """Recent share of layer calls with demand loads: of one token, of many."""

    @property
    def transfer_us(self) -> float:
        return self._costs.transfer_us

    def send(self, layer: int, expert: int, slot: int, now_us: float) -> Move:
        """Queue one transfer."""
        start_us = max(self.free_us, now_us)
        self.free_us = start_us + self._costs.transfer_us
        self._counters.link_bytes += self._expert_bytes
        return Move(layer, expert, slot, start_us, self.free_us)

    def withdraw(self) -> None:
        """Take back one transfer that the link has not begun."""
        self.free_us -= self._costs.transfer_us
        self._counters.link_bytes -= self._expert_bytes

    def end_us(self, idle: IdleTime) -> float:
        """When one more transfer would have arrived."""
        return max(self.free_us, idle.now_us) + self._costs.transfer_us

    def layer_start_us(self, distance: int, idle: IdleTime) -> float:
        """When the layer at that distance is expected to begin."""
        return idle.until_us + (distance - 1) * self.layer_us

    def room(self, idle: IdleTime) -> int:
        """How many prefetches are worth choosing in this time."""
        transfer_us = self._costs.transfer_us
        if transfer_us <= 0.0:
            return 0
        left_us = idle.until_us - max(self.free_us, idle.now_us)
        return max(0, int(left_us / transfer_us)) + LATE_PREFETCHES

    def note_layer(self, spent_us: float) -> None:
        """A layer takes that long, the part up to the next MoE layer included."""
        if self.layer_us:
            self.layer_us += LAYER_STEP * (spent_us - self.layer_us)
        else:
            self.layer_us = spent_us

    def note_call(self, many: bool, demand: bool) -> None:
        """A layer call has been planned, with or without demand loads."""
        self.demand_share[many] += DEMAND_STEP * (demand - self.demand_share[many])
