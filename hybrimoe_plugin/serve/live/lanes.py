"""How busy CPU, accelerator and link were in the last second, in equal pieces of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.policy.step import Computed

NAMES = ("cpu", "accelerator", "link")
PIECES = 100
"""Of the window."""


class Lanes:
    """Adds up calls on an engine's clock.

    A measured call knows when it began and ended, but not when each part of the machine was done:
    as in a timeline, planned times are scaled to the measured one. Transfers have predicted times.

    Args:
        window_us: what is shown, up to now.
    """

    def __init__(self, window_us: float) -> None:
        self._piece_us = window_us / PIECES
        self._busy = np.zeros((len(NAMES), 2 * PIECES))
        """Microseconds in each piece of time: the window, then what is predicted behind it."""
        self._first = 0
        """Number of the first of these pieces, counted from the clock's zero."""

    def add(self, calls: Sequence[Computed], now_us: float) -> None:
        """Move the window up to now, and put calls into it."""
        self._move(int(now_us // self._piece_us) + 1 - PIECES)
        spans: tuple[list[tuple[float, float]], ...] = ([], [], [])
        on_cpu, on_accelerator, on_link = spans
        for step, ahead, start_us, spent_us in calls:
            plan = step.plan
            scale = spent_us / plan.makespan_us if plan.makespan_us > 0 else 0.0
            on_cpu.append((start_us, start_us + plan.cpu_us * scale))
            on_accelerator.append((start_us, start_us + plan.accelerator_us * scale))
            for move in step.moves:
                on_link.append((move.start_us, move.end_us))
            for move in ahead:
                on_link.append((move.start_us, move.end_us))
        for lane, found in enumerate(spans):
            if found:
                self._busy[lane] += self._in_pieces(np.array(found))

    def shares(self) -> NDArray[np.float64]:
        """[3, 100] busy share of each piece, oldest first, 0 to 1."""
        return np.minimum(self._busy[:, :PIECES] / self._piece_us, 1.0)

    def _move(self, first: int) -> None:
        by = first - self._first
        if by <= 0:
            return
        self._first = first
        kept = self._busy[:, by:]
        self._busy = np.pad(kept, ((0, 0), (0, self._busy.shape[1] - kept.shape[1])))

    def _in_pieces(self, spans: NDArray[np.float64]) -> NDArray[np.float64]:
        """[200] microseconds that spans [N, 2] have in each piece."""
        edges = (self._first + np.arange(self._busy.shape[1] + 1)) * self._piece_us
        # What lies before an edge, summed over all spans; its growth from edge to edge.
        begun = np.minimum(edges, spans[:, 1:]) - spans[:, :1]
        before: NDArray[np.float64] = np.maximum(begun, 0.0).sum(axis=0)
        return np.diff(before)
