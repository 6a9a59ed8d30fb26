"""Detect other programs that disturbed a measurement.

Two signs are looked at: threads that waited for a core, and repetitions whose times differ.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Median = Callable[[Sequence[float]], float]

MOST_WAITING = 0.1
"""Share of the time that the process's threads may wait for a core.

Alone on a machine it is below 0.01; with two more busy programs on two cores it was 0.5.
"""

MOST_SPREAD = 1.5
"""Ratio of a call's upper to its lower quartile beyond which its repetitions count as differing."""
MOST_SPREAD_CALLS = 1 / 3
"""Share of the calls whose repetitions may differ; a few differ on any machine."""


class Noise:
    """Watches one measurement, which begins when this object is made.

    Args:
        lost_seconds: how much processor time other programs have taken so far; None if that is
            unknown. Without it, the time for which this process's threads waited for a core.
    """

    def __init__(self, lost_seconds: Callable[[], float | None] | None = None) -> None:
        self._lost_seconds = lost_seconds or _waited_seconds
        self._spreads: list[float] = []
        self._began = time.monotonic()
        self._lost = self._lost_seconds()

    def median(self, times: Sequence[float]) -> float:
        """The median of a call's repetitions; remembers their spread."""
        if len(times) > 1:
            lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
            spread = upper / lower if lower > 0 else 1.0
            self._spreads.append(spread)
        return statistics.median(times)

    def verdict(self) -> str:
        """What disturbed the finished measurement; empty if nothing did."""
        lost = self._lost_seconds()
        if lost is not None and self._lost is not None:
            elapsed = max(1e-9, time.monotonic() - self._began)
            if (lost - self._lost) / elapsed > MOST_WAITING:
                return "other programs used the processor while the machine was measured"
        differing = sum(spread > MOST_SPREAD for spread in self._spreads)
        if differing > MOST_SPREAD_CALLS * len(self._spreads):
            return (
                "the machine was not quiet while it was measured: repetitions of "
                f"{differing} of {len(self._spreads)} calls differ by more than a factor of "
                f"{MOST_SPREAD}"
            )
        return ""


def _waited_seconds() -> float | None:
    """Total time for which the process's threads were ready to run but had no core.

    None where the system does not count it.
    """
    total = 0
    try:
        for task in Path("/proc/self/task").iterdir():
            total += int((task / "schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return total / 1e9
