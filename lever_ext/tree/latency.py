"""An online table of measured verification times over (rows, leaves), with conservative interpolation (paper 2a)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class LatencyTable:
    """Moving averages of measured times; unseen shapes take their neighbours' plus a penalty.

    Rows are interpolated between the nearest measured row counts; leaves use the nearest measured count of the same
    rows. Beyond the last measured row count the line through everything measured goes on.

    Passes are noisy, and one slow pass must not keep trees away from its shape for good: what was measured seldom is
    drawn towards a line through everything measured; what was measured often (a bucket's edge) stands for itself.

    Args:
        step: weight of a new measurement.
        penalty: share added for shapes far from all that were measured.
        trust: measurements of a shape that weigh as much as the line.
        start_us: of any pass, until one is measured.
    """

    step: float = 0.2
    penalty: float = 0.03
    trust: float = 4.0
    start_us: float = 1.0
    cells: dict[tuple[int, int], float] = field(default_factory=dict)
    """(rows, leaves) -> microseconds."""
    _by_rows: dict[int, dict[int, float]] = field(default_factory=dict)
    _counts: dict[tuple[int, int], int] = field(default_factory=dict)
    _line: tuple[float, float] = (0.0, 0.0)
    """Microseconds without rows, and for each row."""
    _cache: dict[tuple[int, int], float] = field(default_factory=dict)

    def observe(self, rows: int, leaves: int, us: float) -> None:
        """Add a measured time in microseconds. Mutates."""
        old = self.cells.get((rows, leaves))
        new = us if old is None else old + self.step * (us - old)
        self.cells[rows, leaves] = new
        self._by_rows.setdefault(rows, {})[leaves] = new
        self._counts[rows, leaves] = self._counts.get((rows, leaves), 0) + 1
        self._line = self._fit()
        self._cache.clear()

    def warm_start(self, measured: Iterable[tuple[int, int, float]]) -> None:
        """Fill from an offline measurement of (rows, leaves, microseconds). Mutates."""
        for rows, leaves, us in measured:
            self.observe(rows, leaves, us)

    def __call__(self, rows: int, leaves: int) -> float:
        """Predicted microseconds; `start_us` where no tree was ever measured, so that gain alone decides."""
        key = (rows, leaves)
        if key not in self._cache:
            self._cache[key] = self._predict(rows, leaves)
        return self._cache[key]

    def _predict(self, rows: int, leaves: int) -> float:
        if not self._by_rows:
            return self.start_us
        if (rows, leaves) in self.cells:
            return self._drawn(rows, leaves)
        known = sorted(self._by_rows)
        at = bisect_left(known, rows)
        if at < len(known) and known[at] == rows:
            return self._row(rows, leaves)
        if at == 0:
            # Fewer rows than ever measured cannot cost more than the fewest measured.
            return self._row(known[0], leaves)
        low = self._row(known[at - 1], leaves)
        if at < len(known):
            high = self._row(known[at], leaves)
            share = (rows - known[at - 1]) / (known[at] - known[at - 1])
            near = min(rows - known[at - 1], known[at] - rows)
            return max(low, low + share * (high - low)) * self._caution(near, rows)
        beyond = rows - known[-1]
        return (low + beyond * self._slope()) * self._caution(beyond, rows)

    def _caution(self, gap: int, rows: int) -> float:
        """1 next to a measured row count, growing to 1 + penalty at a quarter of the rows away."""
        return 1 + self.penalty * min(1.0, 4 * gap / rows)

    def _fit(self) -> tuple[float, float]:
        """Least squares through all cells by row count, its slope not negative."""
        weights = {shape: min(count, 8) for shape, count in self._counts.items()}
        total = sum(weights.values())
        rows = sum(weight * shape[0] for shape, weight in weights.items()) / total
        us = sum(weight * self.cells[shape] for shape, weight in weights.items()) / total
        spread = sum(weight * (shape[0] - rows) ** 2 for shape, weight in weights.items())
        joint = sum(weight * (shape[0] - rows) * (self.cells[shape] - us) for shape, weight in weights.items())
        slope = max(0.0, joint / spread) if spread else 0.0
        return us - slope * rows, slope

    def _drawn(self, rows: int, leaves: int) -> float:
        """A measured shape's time, drawn towards the line while there are few measurements."""
        line = self._line[0] + self._line[1] * rows
        count = self._counts[rows, leaves]
        return (count * self.cells[rows, leaves] + self.trust * line) / (count + self.trust)

    def _row(self, rows: int, leaves: int) -> float:
        near = min(self._by_rows[rows], key=lambda found: (abs(found - leaves), -found))
        return self._drawn(rows, near)

    def _slope(self) -> float:
        """Microseconds per row beyond the table: the line's; a five-hundredth of a pass while one shape is known."""
        return self._line[1] if len(self._by_rows) > 1 else self._line[0] / 500
