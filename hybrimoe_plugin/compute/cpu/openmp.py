"""The calling thread's OpenMP team, which torch and ggml share."""

from __future__ import annotations

import ctypes

_PAUSE_SOFT = 1
"""OpenMP's `omp_pause_soft`: threads end, settings stay."""


def release_team() -> None:
    """End the team of the calling thread, which must not be computing; its next work makes another.

    Each thread that computes has a team of its own. If those of all threads together are more than
    the machine's cores, libgomp lets them sleep at every barrier instead of spinning, even where
    all but one are idle: every step of a model takes a tenth longer (docs/LOG.md). So whoever has
    computed, and hands the model to another thread, calls this.
    """
    # torch loads its OpenMP library with its symbols visible to all.
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_PAUSE_SOFT)
