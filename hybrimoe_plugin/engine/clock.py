"""Time as the engine sees it: real or simulated, and the time between two MoE layers."""

from __future__ import annotations

from time import perf_counter_ns
from typing import NamedTuple

from hybrimoe_plugin.policy.step import FEW_ROWS


class WallClock:
    """Real time; the hardware decides when a call ends."""

    emulated = False

    def now_us(self) -> float:
        return perf_counter_ns() / 1e3


class SimulatedClock:
    """Time that passes only as the machine profile says; every number taken from it is emulated."""

    emulated = True

    def __init__(self) -> None:
        self._now_us = 0.0

    def now_us(self) -> float:
        return self._now_us

    def advance(self, us: float) -> None:
        self._now_us += us


class _EndedCall(NamedTuple):
    layer: int
    kind: int
    at_us: float


class InterLayerTime:
    """How long attention and dense parts take between two MoE layers, measured as the model runs.

    No profile knows it: it belongs to the model, not to the machine. In that time the link may
    prefetch.
    """

    NEWEST = 0.05
    """Weight of the newest measurement in the moving average."""

    def __init__(self) -> None:
        self._known_us: dict[int, float] = {}
        """Averages by kind of call: of one token, of a few rows, of many."""
        self._last: _EndedCall | None = None

    def begin(self, layer: int, tokens: int, now_us: float) -> float | None:
        """Note that a call begins.

        Returns:
            The average time between layers for calls of this kind; None before the first
            measurement.
        """
        kind = _kind(tokens)
        known = self._known_us.get(kind)
        last = self._last
        self._last = None
        if last is None or last.layer != layer - 1 or last.kind != kind:
            return known
        spent_us = max(0.0, now_us - last.at_us)
        known = spent_us if known is None else known + self.NEWEST * (spent_us - known)
        self._known_us[kind] = known
        return known

    def end(self, layer: int, tokens: int, planned_us: float) -> None:
        """Note that a call is over by plan at `planned_us`.

        The device may still compute when the host is done.
        """
        self._last = _EndedCall(layer, _kind(tokens), planned_us)


def _kind(tokens: int) -> int:
    """0 for one token, 1 for a few rows, 2 for many."""
    return (tokens > 1) + (tokens > FEW_ROWS)
