"""How many tokens of prompts one pass computes."""

from __future__ import annotations

STALL = 0.3
"""Seconds that prompts may take in a pass while as many answers wait for their next token."""

LONGEST_STALL = 1.0
"""Seconds that they may take where more prompts wait than answers."""

SMALLEST = 32
"""Tokens of a piece at least: smaller ones read all weights for too little."""

_NEWEST = 0.3
"""Weight of the newest measurement in the average."""


class PieceSize:
    """Sizes pieces by the time that the last ones took.

    Args:
        most: tokens of prompts in a pass where no answer waits.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._per_token: float | None = None
        """Seconds; None before the first piece."""

    def size(self, prompts: int, answers: int) -> int:
        """Tokens of the next pieces together.

        Args:
            prompts: how many wait to be computed.
            answers: how many wait for their next token.
        """
        if not answers:
            return self._most
        if self._per_token is None:
            return min(self._most, SMALLEST)
        seconds = min(LONGEST_STALL, STALL * max(1.0, prompts / answers))
        fitting = int(seconds / self._per_token)
        return min(self._most, max(SMALLEST, fitting))

    def took(self, tokens: int, seconds: float) -> None:
        """Note a piece. Small ones tell little: every pass has a cost of its own."""
        if tokens < SMALLEST:
            return
        newest = max(seconds, 1e-6) / tokens
        known = newest if self._per_token is None else self._per_token
        self._per_token = (1 - _NEWEST) * known + _NEWEST * newest
