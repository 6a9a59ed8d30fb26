"""Presence and frequency penalties, which transformers does not have."""

from __future__ import annotations

import torch


class AnswerPenalties:
    """Lowers the logits of tokens that the answer holds, as OpenAI defines it.

        logit - count * frequency - (count > 0) * presence

    Prompts do not count. Called like transformers' logits processors.
    """

    def __init__(self, presence: float, frequency: float, vocabulary: int) -> None:
        self._presence = presence
        self._frequency = frequency
        self._counts = torch.zeros(vocabulary, dtype=torch.float32)

    def __call__(self, ids: object, scores: torch.Tensor) -> torch.Tensor:
        """Args: scores: [B, V] float32."""
        penalty = self._counts * self._frequency + (self._counts > 0) * self._presence
        return scores - penalty

    def add(self, token: int) -> None:
        """Count a token of the answer."""
        self._counts[token] += 1
