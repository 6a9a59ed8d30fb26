"""An online table of measured verification times over (rows, leaves), with conservative
interpolation (paper 2a).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class LatencyTable:
    """Moving averages of measured times; unseen shapes take their neighbours' plus a penalty.

    Rows are interpolated between the nearest measured row counts; leaves use the nearest measured
    count of the same rows. Beyond the last measured row count the line through everything measured
    goes on.

    Passes are noisy, and one slow pass must not keep trees away from its shape for good: what was
    measured seldom is drawn towards a line through everything measured; what was measured often (a
    bucket's edge) stands for itself.

    Args:
        step: weight of a new measurement.
        penalty: share added for shapes far from all that were measured.
        trust: measurements of a shape that weigh as much as the line.
        held: squared rows, summed over measurements, that tell as much about a row's cost as the
            prior does.
        start_us: of any pass, until one is measured.
    """

    step: float = 0.2
    penalty: float = 0.03
    trust: float = 4.0
    held: float = 2.0 * 32**2
    start_us: float = 1.0
    cells: dict[tuple[int, int], float] = field(default_factory=dict)
    """(rows, leaves) -> microseconds."""
    _by_rows: dict[int, dict[int, float]] = field(default_factory=dict)
    _counts: dict[tuple[int, int], int] = field(default_factory=dict)
    _line: tuple[float, float] = (0.0, 0.0)
    """Microseconds without rows, and for each row."""
    _grid: NDArray[np.float64] | None = None
    """Predictions, [rows, leaves]; made anew after each measurement, when somebody asks."""

    def observe(self, rows: int, leaves: int, us: float) -> None:
        """Add a measured time in microseconds. Mutates."""
        old = self.cells.get((rows, leaves))
        new = us if old is None else old + self.step * (us - old)
        self.cells[rows, leaves] = new
        self._by_rows.setdefault(rows, {})[leaves] = new
        self._counts[rows, leaves] = self._counts.get((rows, leaves), 0) + 1
        self._line = self._fit()
        self._grid = None

    def warm_start(self, measured: Iterable[tuple[int, int, float]]) -> None:
        """Fill from an offline measurement of (rows, leaves, microseconds). Mutates."""
        for rows, leaves, us in measured:
            self.observe(rows, leaves, us)

    def __call__(self, rows: int, leaves: int) -> float:
        """Predicted microseconds; `start_us` where no tree was ever measured, so that gain alone
        decides.
        """
        return float(self._up_to(max(rows, leaves))[rows, leaves])

    def prefixes(self, leaves: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predicted microseconds of 1, 2, ... rows with so many leaves each: float64 [N]."""
        found: NDArray[np.float64] = self._up_to(len(leaves))[np.arange(1, len(leaves) + 1), leaves]
        return found

    @property
    def most_rows(self) -> int:
        """Of all passes measured; 0 before the first."""
        return max(self._by_rows, default=0)

    def _up_to(self, size: int) -> NDArray[np.float64]:
        if self._grid is None or len(self._grid) <= size:
            self._grid = self._predict(max(128, size))
        return self._grid

    def _predict(self, size: int) -> NDArray[np.float64]:
        """The grid for 0..size rows and leaves."""
        if not self._by_rows:
            return np.full((size + 1, size + 1), self.start_us)
        known = np.array(sorted(self._by_rows))
        measured = np.stack([self._row(int(rows), size) for rows in known])
        rows = np.arange(size + 1)
        at = np.searchsorted(known, rows)
        low, high = np.maximum(at - 1, 0), np.minimum(at, len(known) - 1)
        # Fewer rows than ever measured cannot cost more than the fewest measured.
        within = (rows > known[0]) & (rows < known[-1]) & (known[high] != rows)
        span = np.maximum(known[high] - known[low], 1)
        share = np.where(within, (rows - known[low]) / span, 0.0)[:, None]
        floor = np.where(within | (rows > known[-1]), low, high)
        base = np.maximum(
            measured[floor], measured[floor] + share * (measured[high] - measured[floor])
        )
        beyond = np.maximum(rows - known[-1], 0)
        gap = np.where(within, np.minimum(rows - known[low], known[high] - rows), beyond)
        # Next to a measured row count nothing, growing to the penalty at a quarter of the rows
        # away.
        caution = 1 + self.penalty * np.minimum(1.0, 4 * gap / np.maximum(rows, 1))
        grid: NDArray[np.float64] = (base + (beyond * self._line[1])[:, None]) * caution[:, None]
        return grid

    def _row(self, rows: int, size: int) -> NDArray[np.float64]:
        """Of a measured row count with 0..size leaves: the nearest measured, the larger of two as
        near.
        """
        known = np.array(sorted(self._by_rows[rows]))
        times = np.array([self._drawn(rows, int(leaves)) for leaves in known])
        near: NDArray[np.float64] = times[
            np.searchsorted((known[1:] + known[:-1]) / 2, np.arange(size + 1), "right")
        ]
        return near

    def _fit(self) -> tuple[float, float]:
        """Least squares through all cells by row count; its slope is held near a five-hundredth of
        a pass.

        Small trees of nearly one size say nothing about what a row costs. A slope that their noise
        made steep would keep larger trees away for good.
        """
        weights = {shape: min(count, 8) for shape, count in self._counts.items()}
        total = sum(weights.values())
        rows = sum(weight * shape[0] for shape, weight in weights.items()) / total
        us = sum(weight * self.cells[shape] for shape, weight in weights.items()) / total
        spread = sum(weight * (shape[0] - rows) ** 2 for shape, weight in weights.items())
        joint = sum(
            weight * (shape[0] - rows) * (self.cells[shape] - us)
            for shape, weight in weights.items()
        )
        slope = max(0.0, (joint + self.held * us / 500) / (spread + self.held))
        return us - slope * rows, slope

    def _drawn(self, rows: int, leaves: int) -> float:
        """A measured shape's time, drawn towards the line while there are few measurements."""
        line = self._line[0] + self._line[1] * rows
        count = self._counts[rows, leaves]
        return (count * self.cells[rows, leaves] + self.trust * line) / (count + self.trust)
