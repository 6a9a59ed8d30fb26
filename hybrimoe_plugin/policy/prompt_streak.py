"""Whether prompts follow one another, and what they needed.

A single prompt is followed by an answer, whose tokens correct what the prompt did to the layers'
shares of the slots. If the next pass is a prompt again (another request, or the next part of a long
text), nothing corrects them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

NEWEST = 0.3
"""Weight of the newest prompt in the loads: a memory of about three prompts."""


class PromptStreak:
    """Follows layer calls; a streak is two or more passes of many tokens in a row.

    Args:
        shape: (L, E).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.loads = np.zeros(shape)
        """[L, E] tokens per prompt that chose each expert, a moving average."""
        self.active = False
        """Whether this pass and the one before it have many tokens."""
        self._layer = shape[0]
        self._tokens = 1

    def follow(self, layer: int, loads: Mapping[int, int], tokens: int) -> None:
        """A layer call begins. Mutates.

        Args:
            loads: expert -> tokens of the call that chose it.
            tokens: T of the call.
        """
        if layer <= self._layer:  # a new pass
            self.active = min(tokens, self._tokens) > 1
        self._layer, self._tokens = layer, tokens
        if tokens > 1:
            average = self.loads[layer]
            average *= 1.0 - NEWEST
            newest = np.fromiter(loads.values(), float, len(loads))
            average[list(loads)] += NEWEST * newest
