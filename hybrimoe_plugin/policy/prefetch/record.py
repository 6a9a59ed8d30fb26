"""What became of the prefetches that were sent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hybrimoe_plugin.core import OFFLOADED, ExpertRef, Routed
from hybrimoe_plugin.policy.counters import Counters

DOUBTFUL = 0.6
"""Predictions less likely than this would waste more transfers than they save: they are tried only
while enough prefetches have been used.
"""
USED_SHARE = 0.65
"""Share of recent prefetches in decode that must have been needed before doubtful ones are tried.
"""
SURE_SHARE = 2.0 * USED_SHARE
"""Confidence that is asked for, plus the share that was used, where too few were used."""
SLACK = 0.05
"""Least confidence of any prefetch."""
FADE = 0.998
"""What is left of old prefetches in the used share when one more is sent: a memory of about 500, of
which `CREDIT` is a small part.
"""
CREDIT = 4.0
"""Prefetches that may be tried before any was used."""


class Sent(NamedTuple):
    """How a prefetch came about."""

    distance: int
    """Layers over which it was predicted."""
    decode: bool
    """Whether a call of one token sent it."""


class PrefetchRecord:
    """Follows each prefetch until it is used, evicted or withdrawn.

    From the share that was used it derives how sure the next ones must be.

    Args:
        counters: where prefetches, used and wasted ones are counted.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self.by_distance: dict[int, list[int]] = {}
        """Distance -> prefetches issued, and those that were then needed."""
        self.issued = 0.0
        """Recent prefetches that calls of one token sent, older ones faded."""
        self.used = 0.0
        """Those of them that were needed."""
        self._unused: dict[ExpertRef, Sent] = {}

    def __contains__(self, ref: ExpertRef) -> bool:
        """Whether the expert was prefetched and has not been needed yet."""
        return ref in self._unused

    def send(self, ref: ExpertRef, distance: int, decode: bool) -> None:
        """A prefetch is sent."""
        self._unused[ref] = Sent(distance, decode)
        self.by_distance.setdefault(distance, [0, 0])[0] += 1
        self._counters.prefetches += 1
        if decode:
            self.issued = self.issued * FADE + 1.0
            self.used *= FADE

    def use(self, ref: ExpertRef) -> None:
        """The expert is needed; counts if it was prefetched."""
        sent = self._unused.pop(ref, None)
        if sent is None:
            return
        self.by_distance[sent.distance][1] += 1
        self.used += sent.decode
        self._counters.prefetches_used += 1

    def use_all(self, layer: int, routed: Iterable[Routed]) -> None:
        """These experts of a layer are needed; those that are offloaded do not count."""
        unused = self._unused
        if not unused:
            return
        for expert, _, ready_us in routed:
            if ready_us != OFFLOADED and (layer, expert) in unused:
                self.use(ExpertRef(layer, expert))

    def among(self, experts: Iterable[int], layer: int) -> list[int]:
        """Those of a layer's experts that were prefetched and have not been needed yet."""
        unused = self._unused
        return [expert for expert in experts if (layer, expert) in unused] if unused else []

    def evict(self, ref: ExpertRef) -> None:
        """The expert loses its slot; counts if nobody used its prefetch."""
        if self._unused.pop(ref, None) is not None:
            self._counters.prefetches_wasted += 1

    def withdraw(self, ref: ExpertRef) -> None:
        """The link never carried this prefetch: as if it had not been sent."""
        sent = self._unused.pop(ref)
        self.by_distance[sent.distance][0] -= 1
        self.issued -= sent.decode
        self._counters.prefetches -= 1

    def clear(self) -> None:
        """Forget the prefetches that were not used; the used share stays."""
        self._unused.clear()

    def least_confidence(self, credit: float = 0.0) -> float:
        """How sure a prediction for one token must be to be sent.

        Doubtful ones are tried while enough were used so far. Else the rest must be sure, and the
        surer the fewer were used: what is chosen comes true less often than its kind.

        Args:
            credit: prefetches that count as used beforehand.
        """
        if self.used + credit > USED_SHARE * self.issued:
            return SLACK
        share = (self.used + CREDIT) / (self.issued + CREDIT)
        return max(DOUBTFUL, SURE_SHARE - share)
