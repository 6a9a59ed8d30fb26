"""Prompt lookup: what followed the last few tokens when they occurred before."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lever_ext.tree.calibrate import Candidates
from lever_ext.tree.candidates import CandidateTree


class NGramDraft:
    """Counts of what followed every n-gram of the text so far; longer matches count more.

    After "a b c d a b", with the counts of "a b" (c: 1) and "b" (c: 1): every context seen n times
    keeps one share in n + 1 for shorter ones, so that c gets 1/2 from "a b" and 1/4 from "b".

    Args:
        longest: tokens of the longest n-gram looked up.
        candidates: proposals for each node at most.
    """

    def __init__(self, longest: int = 4, candidates: int = 4) -> None:
        self.name = "n-gram"
        self.lock = threading.RLock()
        self.context: int | None = None
        self.longest = longest
        self.candidates = candidates
        self._tokens: list[int] = []
        """The text before the root."""
        self._followers: dict[tuple[int, ...], dict[int, int]] = {}
        """N-gram -> how often each token came after it."""

    def start(self, ids: Sequence[int]) -> None:
        self._tokens = []
        self._followers = {}
        self._append(ids)

    def expand(
        self,
        tree: CandidateTree,
        keys: Sequence[int],
    ) -> list[Candidates]:
        found = []
        for key in keys:
            path = [tree.nodes[above].token for above in tree.path(key)]
            found.append(self._after(path))
        return found

    def advance(
        self,
        accepted: Sequence[int],
        tokens: Sequence[int],
        tree: CandidateTree,
    ) -> None:
        self._append(tokens)

    def _append(self, tokens: Sequence[int]) -> None:
        """Count the tokens after every n-gram that ends before them. Mutates."""
        for token in tokens:
            longest = min(self.longest, len(self._tokens))
            for size in range(1, longest + 1):
                context = tuple(self._tokens[-size:])
                counts = self._followers.setdefault(context, {})
                counts[token] = counts.get(token, 0) + 1
            self._tokens.append(token)

    def _after(self, path: Sequence[int]) -> Candidates:
        """Proposals after some tokens that follow the text.

        Args:
            path: the tokens, from the root on.
        """
        tail = [*self._tokens[-self.longest :], *path]
        tail = tail[-self.longest :]
        scores: dict[int, float] = {}
        left = 1.0
        for size in range(len(tail), 0, -1):
            context = tuple(tail[-size:])
            counts = self._followers.get(context, {})
            total = sum(counts.values())
            if not total:
                continue
            for token, count in counts.items():
                share = left * count / (total + 1)
                scores[token] = scores.get(token, 0.0) + share
            # What is left over is for shorter contexts.
            left /= total + 1
        likeliest = sorted(scores, key=lambda token: (-scores[token], token))
        best = likeliest[: self.candidates]
        return Candidates(
            tokens=tuple(best),
            probabilities=tuple(scores[token] for token in best),
        )
