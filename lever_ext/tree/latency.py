"""An online table of measured verification times over (rows, leaves), with conservative interpolation (paper 2a)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class LatencyTable:
    """Moving averages of measured times; unseen shapes take their neighbours' plus a penalty.

    Rows are interpolated between the nearest measured row counts; leaves use the nearest measured count of the same
    rows. Beyond the last measured row count the steepest slope seen continues.

    Args:
        step: weight of a new measurement.
        penalty: share added for shapes never measured.
    """

    step: float = 0.2
    penalty: float = 0.03
    cells: dict[tuple[int, int], float] = field(default_factory=dict)
    """(rows, leaves) -> microseconds."""
    _by_rows: dict[int, dict[int, float]] = field(default_factory=dict)
    _cache: dict[tuple[int, int], float] = field(default_factory=dict)

    def observe(self, rows: int, leaves: int, us: float) -> None:
        """Add a measured time in microseconds. Mutates."""
        old = self.cells.get((rows, leaves))
        new = us if old is None else old + self.step * (us - old)
        self.cells[rows, leaves] = new
        self._by_rows.setdefault(rows, {})[leaves] = new
        self._cache.clear()

    def warm_start(self, measured: Iterable[tuple[int, int, float]]) -> None:
        """Fill from an offline measurement of (rows, leaves, microseconds). Mutates."""
        for rows, leaves, us in measured:
            self.observe(rows, leaves, us)

    def __call__(self, rows: int, leaves: int) -> float:
        """Predicted microseconds; 1 where nothing was ever measured, so that gain alone decides."""
        key = (rows, leaves)
        if key not in self._cache:
            self._cache[key] = self._predict(rows, leaves)
        return self._cache[key]

    def _predict(self, rows: int, leaves: int) -> float:
        if not self._by_rows:
            return 1.0
        if (rows, leaves) in self.cells:
            return self.cells[rows, leaves]
        known = sorted(self._by_rows)
        at = bisect_left(known, rows)
        if at < len(known) and known[at] == rows:
            return self._row(rows, leaves) * (1 + self.penalty)
        if at == 0:
            # Fewer rows than ever measured cannot cost more than the fewest measured.
            return self._row(known[0], leaves)
        low = self._row(known[at - 1], leaves)
        if at < len(known):
            high = self._row(known[at], leaves)
            share = (rows - known[at - 1]) / (known[at] - known[at - 1])
            return max(low, low + share * (high - low)) * (1 + self.penalty)
        return (low + (rows - known[-1]) * self._slope(known, leaves)) * (1 + self.penalty)

    def _row(self, rows: int, leaves: int) -> float:
        cells = self._by_rows[rows]
        near = min(cells, key=lambda found: (abs(found - leaves), -found))
        return cells[near]

    def _slope(self, known: list[int], leaves: int) -> float:
        """Microseconds per row beyond the table: the steepest between measured neighbours, never negative."""
        times = [self._row(rows, leaves) for rows in known]
        pairs = zip(known, known[1:], times, times[1:], strict=False)
        return max((max(0.0, (t2 - t1) / (r2 - r1)) for r1, r2, t1, t2 in pairs), default=times[-1] / 50)
