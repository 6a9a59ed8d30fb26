"""Prompts that no server has seen before."""

from __future__ import annotations

import random

WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work number night
point home water room mother area money story fact month lot right study book eye job word
business issue side kind head house service friend father power hour game line end member law
"""


class Prompts:
    """Draws prompts, the same ones in every run.

    Args:
        vocabulary: number of token ids.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._random = random.Random(0)
        self._words = WORDS.split()

    def draw(self, count: int, tokens: int) -> list[list[int]]:
        """Prompts of random ids. What they say does not matter, but the routing should vary."""
        return [
            [self._random.randrange(3, self._vocabulary) for _ in range(tokens)]
            for _ in range(count)
        ]

    def words(self, count: int) -> str:
        """Random English words, each about one token."""
        return " ".join(self._random.choices(self._words, k=count))
