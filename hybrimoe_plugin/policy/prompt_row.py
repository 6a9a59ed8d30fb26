"""Prompts in a row: does one follow another, and what did they need?

Behind a single prompt comes an answer, whose tokens put right what the prompt did to the layers'
shares of the slots. Where the next pass is a prompt again (another request, the next part of a long
text), nothing does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

STEP = 0.3
"""Weight of the newest prompt in the loads."""


class PromptRow:
    """Follows layer calls.

    Args:
        shape: (L, E).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.loads = np.zeros(shape)
        """[L, E] tokens per prompt that chose each expert, a moving average."""
        self.going = False
        """Whether this pass and the one before it have many tokens."""
        self._layer = shape[0]
        self._tokens = 1

    def follow(self, layer: int, loads: Mapping[int, int], tokens: int) -> None:
        """A layer call begins: `loads` is expert -> tokens that chose it, `tokens` their T.
        Mutates.
        """
        if layer <= self._layer:
            self.going = min(tokens, self._tokens) > 1
        self._layer, self._tokens = layer, tokens
        if tokens > 1:
            row = self.loads[layer]
            row *= 1.0 - STEP
            row[list(loads)] += STEP * np.fromiter(loads.values(), float, len(loads))
