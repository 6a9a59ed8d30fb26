"""An online table of measured verification times over (nodes, leaves) (paper 2a).

Interpolation between measured shapes is conservative.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

GRID = 128
"""Largest tree of the first grid of predictions."""
MOST_WEIGHT = 8
"""Measurements of one shape that count in the line through all of them, at most."""
PASS_NODES = 500
"""A priori a node costs one part in so many of a pass."""


class _Neighbours(NamedTuple):
    """Where each size of 0..N lies among the K measured ones; all [N + 1] but for `sizes`."""

    sizes: NDArray[np.int64]
    """[K], ascending."""
    base: NDArray[np.int64]
    """Index of the measured size whose time is the start of the prediction."""
    above: NDArray[np.int64]
    """Index of the next larger measured size; the largest where there is none."""
    share: NDArray[np.float64]
    """Way from `base` to `above`, 0 outside the measured sizes."""
    gap: NDArray[np.int64]
    """Distance to the nearest measured size; 0 below the smallest."""
    beyond: NDArray[np.int64]
    """Nodes beyond the largest measured size."""

    @classmethod
    def of(cls, sizes: NDArray[np.int64], largest: int) -> _Neighbours:
        """The neighbours of 0..`largest` among some sizes.

        For the sizes (1, 9) and 5 nodes: base 0 (size 1), above 1 (size 9), share 0.5, gap 4. For
        11 nodes: base 1, gap and beyond 2.
        """
        asked = np.arange(largest + 1)
        place = np.searchsorted(sizes, asked)
        below = np.maximum(place - 1, 0)
        above = np.minimum(place, len(sizes) - 1)
        inside = (asked > sizes[0]) & (asked < sizes[-1])
        between = inside & (sizes[above] != asked)
        beyond = np.maximum(asked - sizes[-1], 0)
        to_below = asked - sizes[below]
        to_above = sizes[above] - asked
        span = np.maximum(sizes[above] - sizes[below], 1)
        return cls(
            sizes=sizes,
            # Fewer nodes than ever measured cannot cost more than the fewest measured.
            base=np.where(between | (beyond > 0), below, above),
            above=above,
            share=np.where(between, to_below / span, 0.0),
            gap=np.where(
                between,
                np.minimum(to_below, to_above),
                beyond,
            ),
            beyond=beyond,
        )


@dataclass
class LatencyTable:
    """Moving averages of measured times; unseen shapes take their neighbours' plus a penalty.

    Node counts are interpolated between the nearest measured ones; leaves use the nearest measured
    count of the same nodes. Beyond the last measured node count the line through everything
    measured goes on.

        us
        200 |                          .  line, times 1 + penalty
        180 |                 x     .
        154 |         ?    .             x  measured: 1 node 100 us, 9 nodes 180 us
        140 |         .                  ?  5 nodes: 140 us, times 1 + penalty (here 10 %)
        100 |x  .
            +-----------------------
             1        5       9    nodes

    Passes are noisy, and one slow pass must not keep trees away from its shape for good. A shape
    that was measured seldom is drawn towards a line through everything measured; one that was
    measured often (a bucket's edge) stands for itself.

    Args:
        step: weight of a new measurement.
        penalty: share added for shapes far from all that were measured.
        trust: measurements of a shape that weigh as much as the line.
        prior: squared nodes, summed over measurements, that say as much about what a node costs as
            the prior does.
        start_us: of any pass, until one is measured.
    """

    step: float = 0.2
    penalty: float = 0.03
    trust: float = 4.0
    prior: float = 2.0 * 32**2
    start_us: float = 1.0
    cells: dict[tuple[int, int], float] = field(default_factory=dict)
    """(nodes, leaves) -> microseconds."""
    _by_nodes: dict[int, set[int]] = field(default_factory=dict)
    """Nodes -> measured leaf counts."""
    _counts: dict[tuple[int, int], int] = field(default_factory=dict)
    """(nodes, leaves) -> measurements."""
    _line: tuple[float, float] = (0.0, 0.0)
    """Microseconds without nodes, and for each node."""
    _grid: NDArray[np.float64] | None = None
    """Predictions, [nodes, leaves]; computed on demand, dropped by each measurement."""

    def observe(self, nodes: int, leaves: int, us: float) -> None:
        """Add a measured time in microseconds. Mutates."""
        shape = nodes, leaves
        old = self.cells.get(shape, us)
        self.cells[shape] = old + self.step * (us - old)
        self._by_nodes.setdefault(nodes, set()).add(leaves)
        self._counts[shape] = self._counts.get(shape, 0) + 1
        self._line = self._fit()
        self._grid = None

    def warm_start(self, measured: Iterable[tuple[int, int, float]]) -> None:
        """Fill from an offline measurement of (nodes, leaves, microseconds). Mutates."""
        for nodes, leaves, us in measured:
            self.observe(nodes, leaves, us)

    def __call__(self, nodes: int, leaves: int) -> float:
        """Predicted microseconds; `start_us` before the first pass, so that gain alone decides."""
        grid = self._up_to(max(nodes, leaves))
        return float(grid[nodes, leaves])

    def prefixes(self, leaves: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predicted microseconds of 1, 2, ... nodes with so many leaves each: float64 [N]."""
        count = len(leaves)
        grid = self._up_to(count)
        found: NDArray[np.float64] = grid[np.arange(1, count + 1), leaves]
        return found

    @property
    def most_nodes(self) -> int:
        """Of all trees measured; 0 before the first."""
        return max(self._by_nodes, default=0)

    def _up_to(self, size: int) -> NDArray[np.float64]:
        if self._grid is None or len(self._grid) <= size:
            self._grid = self._predict(max(GRID, size))
        return self._grid

    def _predict(self, size: int) -> NDArray[np.float64]:
        """The grid for 0..size nodes and leaves."""
        if not self._by_nodes:
            return np.full((size + 1, size + 1), self.start_us)
        # Along the leaves every measured node count is filled first, then along the nodes.
        sizes = np.array(sorted(self._by_nodes))
        near = _Neighbours.of(sizes, size)
        measured = np.stack([self._by_leaves(int(nodes), size) for nodes in sizes])
        base = measured[near.base]
        rise = measured[near.above] - base
        between = np.maximum(base, base + near.share[:, None] * rise)
        slope = self._line[1]
        further = (near.beyond * slope)[:, None]
        # No penalty next to a measured size; all of it where that is a quarter of the nodes away.
        asked = np.arange(size + 1)
        distance = np.minimum(1.0, 4 * near.gap / np.maximum(asked, 1))
        caution = 1 + self.penalty * distance
        grid: NDArray[np.float64] = (between + further) * caution[:, None]
        return grid

    def _by_leaves(self, nodes: int, size: int) -> NDArray[np.float64]:
        """Microseconds of a measured node count with 0..size leaves, [size + 1].

        The nearest measured leaf count stands for the others; of two as near, the larger one.
        """
        known = np.array(sorted(self._by_nodes[nodes]))
        times = np.array([self._smoothed(nodes, int(leaves)) for leaves in known])
        middles = (known[1:] + known[:-1]) / 2
        nearest = np.searchsorted(middles, np.arange(size + 1), "right")
        found: NDArray[np.float64] = times[nearest]
        return found

    def _fit(self) -> tuple[float, float]:
        """Least squares through all cells by node count: (intercept, slope).

        The slope is held near a pass divided by `PASS_NODES`. Small trees of nearly one size say
        nothing about what a node costs, and a slope that their noise made steep would keep larger
        trees away for good.
        """
        total = 0
        sum_nodes = sum_us = 0.0
        for shape, count in self._counts.items():
            weight = min(count, MOST_WEIGHT)
            total += weight
            sum_nodes += weight * shape[0]
            sum_us += weight * self.cells[shape]
        mean_nodes = sum_nodes / total
        mean_us = sum_us / total
        spread = joint = 0.0
        for shape, count in self._counts.items():
            weight = min(count, MOST_WEIGHT)
            offset = shape[0] - mean_nodes
            spread += weight * offset**2
            joint += weight * offset * (self.cells[shape] - mean_us)
        # The prior is a line of its own through the mean, with `prior` squared nodes of spread.
        held = self.prior * mean_us / PASS_NODES
        slope = max(0.0, (joint + held) / (spread + self.prior))
        return mean_us - slope * mean_nodes, slope

    def _smoothed(self, nodes: int, leaves: int) -> float:
        """A measured shape's time, drawn towards the line while there are few measurements."""
        intercept, slope = self._line
        expected = intercept + slope * nodes
        count = self._counts[nodes, leaves]
        measured = count * self.cells[nodes, leaves]
        return (measured + self.trust * expected) / (count + self.trust)
