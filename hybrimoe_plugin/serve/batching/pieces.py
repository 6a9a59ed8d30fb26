"""How many tokens of a prompt one pass computes."""

from __future__ import annotations

LONGEST_STALL = 0.3
"""Seconds that a piece may take while answers wait for their next token."""

SMALLEST = 32
"""Tokens of a piece at least: smaller ones read all weights for too little."""

_NEWEST = 0.3
"""Weight of the newest measurement in the average."""


class PieceSize:
    """Sizes pieces by the time that the last ones took.

    Args:
        most: tokens of a piece where nobody waits.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._per_token: float | None = None
        """Seconds; None before the first piece."""

    def size(self, others_wait: bool) -> int:
        """Tokens of the next piece."""
        if not others_wait:
            return self._most
        if self._per_token is None:
            return min(self._most, SMALLEST)
        fitting = int(LONGEST_STALL / self._per_token)
        return min(self._most, max(SMALLEST, fitting))

    def took(self, tokens: int, seconds: float) -> None:
        """Note a piece. Small ones tell little: every pass has a cost of its own."""
        if tokens < SMALLEST:
            return
        newest = max(seconds, 1e-6) / tokens
        known = newest if self._per_token is None else self._per_token
        self._per_token = (1 - _NEWEST) * known + _NEWEST * newest
