"""How many tokens an answer took."""

from __future__ import annotations

from hybrimoe_plugin.serve.text.asking import Delta
from hybrimoe_plugin.serve.text.parts import Reasoning


class Counts:
    """Tokens of one prompt and its answer.

    Attributes:
        prompt: all of them.
        cached: those of the prompt that needed no computation.
        answer: all of them, as the scheduler counts.
        reasoning: those of the answer that were reasoning.
    """

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        self.cached = 0
        self.answer = 0
        self.reasoning = 0
        self._reasons = False

    def add(self, delta: Delta) -> None:
        """Count what is new."""
        self.cached += delta.cached_tokens or 0
        for token, parts in delta.steps:
            if parts:
                self._reasons = isinstance(parts[-1], Reasoning)
            self.reasoning += token is not None and self._reasons
        if delta.end is not None:
            self.answer = delta.end.tokens
