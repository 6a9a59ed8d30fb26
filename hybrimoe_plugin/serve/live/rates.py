"""Rates over the last two seconds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from hybrimoe_plugin.policy.counters import Counters

WINDOW_S = 2.0


class Counted(NamedTuple):
    """What was counted from one sample to the next."""

    tokens: int
    """Of decode passes."""
    prompt_tokens: int
    hits: int
    needed: int
    """Experts that calls needed."""


@dataclass(frozen=True)
class Rates:
    """Attributes:
    tokens_s: rows of decode passes, per second.
    prompt_s: tokens of prompts that were computed, per second.
    hit_rate: share of the needed experts that were cached; None where none was needed.
    """

    tokens_s: float
    prompt_s: float
    hit_rate: float | None


class Window:
    """Sums over the newest samples."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Counted]] = deque()

    def add(self, at_s: float, counted: Counted) -> None:
        """Take a sample, and leave old ones out; the window begins with the first that is left."""
        self._samples.append((at_s, counted))
        while len(self._samples) > 2 and self._samples[1][0] <= at_s - WINDOW_S:
            self._samples.popleft()

    def rates(self) -> Rates:
        """Over the window; zeros before the second sample: the first has no known length."""
        if len(self._samples) < 2:
            return Rates(0.0, 0.0, None)
        (began_s, _), *later = self._samples
        spent_s = later[-1][0] - began_s
        total = Counted(*map(sum, zip(*(counted for _, counted in later), strict=True)))
        hit_rate = total.hits / total.needed if total.needed else None
        return Rates(total.tokens / spent_s, total.prompt_tokens / spent_s, hit_rate)


def hits_since(now: Counters, before: Counters) -> tuple[int, int]:
    """Cache hits and experts needed between two snapshots; zeros where counting began anew."""
    hits = now.cache_hits - before.cache_hits
    needed = now.activations - before.activations
    return (hits, needed) if 0 <= hits <= needed else (0, 0)
