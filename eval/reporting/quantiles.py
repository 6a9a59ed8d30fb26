"""Percentiles of measured times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile, interpolated linearly; of at least one value."""
    low, middle, high = np.percentile(values, (20, 50, 80))
    return float(low), float(middle), float(high)


def times_ms(us: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile in ms, and the number of repetitions, as columns of a table.

    Args:
        us: measured times in us, at least one. Outer percentiles are those of
            `statistics.quantiles`, which reach a little further out than `percentiles`.
    """
    low = high = us[0]
    if len(us) > 1:
        deciles = statistics.quantiles(us, n=10)
        low, high = deciles[1], deciles[7]
    return {
        "p20_ms": low / 1e3,
        "p50_ms": statistics.median(us) / 1e3,
        "p80_ms": high / 1e3,
        "repetitions": len(us),
    }
