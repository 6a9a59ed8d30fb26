"""What a prefetcher is given, what it answers, and its interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from hybrimoe_plugin.core import ExpertRef, Routed


class Prediction(NamedTuple):
    """The predicted call of a later layer."""

    layer: int
    distance: int
    """1 for the next MoE layer."""
    routed: tuple[Routed, ...]
    """The predicted experts, with their loads and with when they can be used.

    Empty where all have slots and nobody asks further.
    """
    confidence: Mapping[int, float]
    """Expert -> measured share of such predictions that come true; of those that are followed."""
    few: bool = False
    """Whether the call has a few rows, of several conversations or of a draft's tree."""

    @property
    def trusted(self) -> bool:
        """Whether such predictions have come true at all."""
        return not self.confidence or max(self.confidence.values()) > 0.0


class PrefetchRequest(NamedTuple):
    """An expert that a prefetcher wants to have sent."""

    ref: ExpertRef
    distance: int
    """As in its `Prediction`."""
    impact_us: float
    """Predicted drop of that layer's makespan; 0 where the policy does not estimate it."""
    confidence: float
    """1 where predictions are taken as true."""


class Prefetcher(Protocol):
    """Chooses transfers for the link's idle time."""

    calibrated: bool
    """Whether requests are weighed by measured confidence; otherwise predictions are taken as true.
    """

    def choose(
        self, predictions: Sequence[Prediction], room: int, floor: float = 0.0
    ) -> list[PrefetchRequest]:
        """Offloaded experts to send, most useful first.

        Args:
            predictions: nearest layer first.
            room: how many at most.
            floor: least confidence of a request; only calibrated prefetchers apply it.
        """
        ...
