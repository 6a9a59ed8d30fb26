"""Prompt lookup: what followed the last few tokens when they occurred before."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lever_ext.tree.calibrate import Candidates
from lever_ext.tree.candidates import CandidateTree


class NGramDraft:
    """Counts of what followed every n-gram of the text so far; longer matches count more.

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
        self._followers: dict[tuple[int, ...], dict[int, int]] = {}

    def start(self, ids: Sequence[int]) -> None:
        self._tokens, self._followers = [], {}
        self._append(ids)

    def expand(self, tree: CandidateTree, keys: Sequence[int]) -> list[Candidates]:
        return [self._after([tree.nodes[above].token for above in tree.path(key)]) for key in keys]

    def advance(self, accepted: Sequence[int], tokens: Sequence[int], tree: CandidateTree) -> None:
        self._append(tokens)

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for size in range(1, min(self.longest, len(self._tokens)) + 1):
                counts = self._followers.setdefault(tuple(self._tokens[-size:]), {})
                counts[token] = counts.get(token, 0) + 1
            self._tokens.append(token)

    def _after(self, path: Sequence[int]) -> Candidates:
        tail = [*self._tokens[-self.longest :], *path][-self.longest :]
        scores: dict[int, float] = {}
        left = 1.0
        for size in range(len(tail), 0, -1):
            counts = self._followers.get(tuple(tail[-size:]), {})
            total = sum(counts.values())
            if total:
                # Back off: a context seen `total` times keeps one share in total + 1 for shorter
                # ones.
                for token, count in counts.items():
                    scores[token] = scores.get(token, 0.0) + left * count / (total + 1)
                left /= total + 1
        best = sorted(scores, key=lambda token: (-scores[token], token))[: self.candidates]
        return Candidates(tuple(best), tuple(scores[token] for token in best))
