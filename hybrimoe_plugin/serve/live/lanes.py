"""How busy CPU, accelerator and link were in the last second, in equal pieces of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.policy.step import Computed

Times = NDArray[np.float64]
NAMES = ("cpu", "accelerator", "link")
PIECES = 100
"""Of the window."""


class Lanes:
    """Adds up calls on an engine's clock.

    A measured call knows when it began and ended, but not when each part of the machine was done:
    planned times are scaled to the measured one. Where the accelerator computes alone, nobody waits
    for it, so its times are as planned; those of transfers always are.

    Args:
        window_us: what is shown, up to now.
    """

    def __init__(self, window_us: float) -> None:
        self._piece_us = window_us / PIECES
        self._busy: Times = np.zeros((len(NAMES), 2 * PIECES))
        """Microseconds in each piece of time: the window, then what is predicted behind it."""
        self._first = 0
        """Number of the first of these pieces, counted from the clock's zero."""

    def add(self, calls: Sequence[Computed], now_us: float) -> None:
        """Move the window up to now, and put calls into it."""
        self._move(int(now_us // self._piece_us) + 1 - PIECES)
        if not calls:
            return
        # Plain lists first: this runs beside a pass, several times a second.
        plans = [call.step.plan[3:6] for call in calls]
        makespans, cpu, accelerator = np.array(plans).T
        begun = np.array([call.start_us for call in calls])
        spent = np.array([call.spent_us for call in calls])
        waited = (cpu > 0) & (makespans > 0)
        scales = np.divide(spent, makespans, out=np.ones_like(spent), where=waited)
        sent = [
            move[3:] for call in calls for moves in (call.step.moves, call.ahead) for move in moves
        ]
        from_us, until_us = np.array(sent).T if sent else (np.zeros(0), np.zeros(0))
        self._busy[0] += self._in_pieces(begun, begun + cpu * scales)
        self._busy[1] += self._in_pieces(begun, begun + accelerator * scales)
        self._busy[2] += self._in_pieces(from_us, until_us)

    def shares(self) -> Times:
        """[3, 100] busy share of each piece, oldest first, 0 to 1."""
        shares: Times = np.minimum(self._busy[:, :PIECES] / self._piece_us, 1.0)
        return shares

    def _move(self, first: int) -> None:
        by = first - self._first
        if by <= 0:
            return
        self._first = first
        kept = self._busy[:, by:]
        self._busy = np.pad(kept, ((0, 0), (0, self._busy.shape[1] - kept.shape[1])))

    def _in_pieces(self, starts: Times, ends: Times) -> Times:
        """[200] microseconds that spans of time [N] have in each piece."""
        origin_us = self._first * self._piece_us  # small numbers lose no digits in sums
        edges: Times = np.arange(self._busy.shape[1] + 1) * self._piece_us
        # What lies before an edge, summed over all spans; its growth from edge to edge.
        before: Times = _since(starts - origin_us, edges) - _since(ends - origin_us, edges)
        return np.diff(before)


def _since(times: Times, edges: Times) -> Times:
    """For each edge, the sum of how long ago all earlier times are."""
    times = np.sort(times)
    sums = np.concatenate([[0.0], np.cumsum(times)])
    earlier = np.searchsorted(times, edges)
    since: Times = earlier * edges - sums[earlier]
    return since
