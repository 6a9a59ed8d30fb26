"""Time as the engine sees it: real or simulated, and what passes between two MoE layers."""

from __future__ import annotations

from time import perf_counter_ns


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


class Between:
    """What attention and dense parts take between two MoE layers, measured as the model runs.

    No profile knows it: it is the model's, not the machine's, and it is time in which the link may
    prefetch.
    """

    NEWEST = 0.05
    """Weight of the newest time."""

    def __init__(self) -> None:
        self._us: list[float | None] = [None, None]
        """For calls of one token, and of many."""
        self._last: tuple[int, bool, float] | None = None

    def begin(self, layer: int, tokens: int, now_us: float) -> float | None:
        """A call begins; gives what is known of the time between layers for calls of this kind,
        None for nothing.
        """
        many = tokens > 1
        if self._last is not None and self._last[:2] == (layer - 1, many):
            spent_us = max(0.0, now_us - self._last[2])
            known = self._us[many]
            self._us[many] = spent_us if known is None else known + self.NEWEST * (spent_us - known)
        self._last = None
        return self._us[many]

    def end(self, layer: int, tokens: int, planned_us: float) -> None:
        """The call is over by plan at `planned_us`: the device may still compute when the host is
        done.
        """
        self._last = layer, tokens > 1, planned_us
