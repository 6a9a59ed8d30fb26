"""How often experts are chosen: from a table, or counted in a trace."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.errors import TraceError
from hybrimoe_plugin.files import read_regular
from hybrimoe_plugin.replay.trace import Call, TraceHeader

Popularity = NDArray[np.float64]
"""[L, E] shares; each row sums to 1."""

MAX_BYTES = 4 << 20
UNSEEN = 0.5
"""Choices that every expert counts beforehand, so that no share is 0."""


def read_popularity(path: str | os.PathLike[str]) -> Popularity:
    """[L, E] shares from a fiddler `expert_popularity` table; each row sums to 1.

    Raises:
        TraceError: not such a file.
    """
    try:
        table = json.loads(read_regular(path, MAX_BYTES))["expert_popularity"]
        chosen = np.asarray(table, dtype=np.float64)
        _check(chosen)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TraceError(f"{path}: not a popularity table ({error})") from None
    return chosen / chosen.sum(axis=1, keepdims=True)


def counts(calls: Iterable[Call], header: TraceHeader) -> Popularity:
    """[L, E] shares of how often these calls chose each expert.

    Smoothed by half a choice; rows sum to 1.
    """
    chosen = np.full((header.layers, header.experts), UNSEEN)
    for call in calls:
        np.add.at(chosen[call.layer], call.ids.ravel(), 1.0)
    return chosen / chosen.sum(axis=1, keepdims=True)


def _check(chosen: NDArray[np.float64]) -> None:
    """Raises: ValueError for anything but a table of numbers with a choice in each row."""
    sound = chosen.ndim == 2 and bool(np.isfinite(chosen).all())
    if sound:
        totals = chosen.sum(axis=1)
        sound = chosen.min() >= 0 and bool((totals > 0).all())
    if not sound:
        raise ValueError("counts must be a table of non-negative numbers")
