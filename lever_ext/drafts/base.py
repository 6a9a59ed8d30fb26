"""What a draft is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from lever_ext.tree.calibrate import Candidates
from lever_ext.tree.candidates import CandidateTree


class Draft(Protocol):
    """Proposes likely next tokens after any node of a candidate tree.

    Takes nothing from the global random state.
    """

    name: str
    context: int | None
    """Tokens that it can look back on, prompt and tree together; None for no limit."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held during an answer that it drafts for: a draft follows one sequence."""
        ...

    def start(self, ids: Sequence[int]) -> None:
        """Begin with the tokens before the root. Mutates."""
        ...

    def expand(self, tree: CandidateTree, keys: Sequence[int]) -> list[Candidates]:
        """Proposals after each node; the nodes' ancestors were expanded before. Mutates."""
        ...

    def advance(self, accepted: Sequence[int], tokens: Sequence[int], tree: CandidateTree) -> None:
        """Follow the target to its next root.

        Args:
            accepted: keys from the former root to the last accepted node.
            tokens: their tokens; they now come before the root.
            tree: already advanced; nodes that it no longer holds may be forgotten.

        Mutates: the draft.
        """
        ...
