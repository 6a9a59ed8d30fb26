"""Whether other programs disturbed a measurement: threads that waited for a core, repetitions that
differ.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Median = Callable[[Sequence[float]], float]

MOST_WAITING = 0.1
"""Share of the time that the process's threads may wait for a core. Alone on a machine it is below
0.01; with two more busy programs on two cores it was 0.5.
"""

MOST_SPREAD = 1.5
"""The upper quartile of a call's repetitions over the lower one, beyond which they are said to
differ.
"""
MOST_SPREAD_CALLS = 1 / 3
"""Share of the calls whose repetitions may differ: single calls do so on any machine."""


class Noise:
    """Watches one measurement; made when it begins."""

    def __init__(self) -> None:
        self._spreads: list[float] = []
        self._began = time.monotonic()
        self._waited = _waited_seconds()

    def median(self, times: Sequence[float]) -> float:
        """The median of a call's repetitions, whose spread is noted."""
        if len(times) > 1:
            lower, _, upper = statistics.quantiles(times, n=4, method="inclusive")
            self._spreads.append(upper / lower if lower > 0 else 1.0)
        return statistics.median(times)

    def verdict(self) -> str:
        """What disturbed the measurement, which is over; empty if nothing did."""
        waited = _waited_seconds()
        if waited is not None and self._waited is not None:
            share = (waited - self._waited) / max(1e-9, time.monotonic() - self._began)
            if share > MOST_WAITING:
                return (
                    "other programs used the processor while the machine was measured "
                    f"({share:.2g} threads waited for a core on average)"
                )
        differing = sum(spread > MOST_SPREAD for spread in self._spreads)
        if differing > MOST_SPREAD_CALLS * len(self._spreads):
            return (
                f"the machine was not quiet while it was measured: repetitions of {differing} of "
                f"{len(self._spreads)} "
                f"calls differ by more than a factor of {MOST_SPREAD}"
            )
        return ""


def _waited_seconds() -> float | None:
    """How long the process's threads were ready to run and had no core, in all; None where Linux
    does not count it.
    """
    total = 0
    try:
        for task in Path("/proc/self/task").iterdir():
            total += int((task / "schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return total / 1e9
