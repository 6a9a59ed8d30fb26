"""The token tree that one target pass verifies: frozen, parents before children, the root
in row 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lever_ext.tree.cost import Drafted

ROOT_PARENT = -1


@dataclass(frozen=True)
class TokenTree:
    """Drafted continuations of a sequence; row 0 is the sequence's last token, whose KV entry is
    still missing.

    Args:
        tokens: token id of each of the N rows.
        parents: row of each node's parent, smaller than its own; -1 for the root alone.
        reach: probability that verification reaches the node; 1 for the root.
        keys: the drafter's name for each node, so that what was accepted can be told to it.

    Raises:
        ValueError: no rows, unequal lengths, a parent that does not come before its child, or two
            children of one parent with the same token.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    reach: tuple[float, ...]
    keys: tuple[int, ...]

    def __post_init__(self) -> None:
        size = len(self.tokens)
        if not size or {len(self.parents), len(self.reach), len(self.keys)} != {size}:
            raise ValueError(
                "a token tree needs at least its root, and one parent, reach and key for each token"
            )
        if self.parents[0] != ROOT_PARENT or any(
            not 0 <= p < i for i, p in enumerate(self.parents) if i
        ):
            raise ValueError(
                f"parents must come before their children, the root first: {self.parents}"
            )
        edges = set(zip(self.parents, self.tokens, strict=True))
        if len(edges) != size:
            raise ValueError("two children of one node have the same token")

    @classmethod
    def of_root(cls, token: int, key: int = 0) -> TokenTree:
        """The tree of plain decoding: nothing drafted."""
        return cls((token,), (ROOT_PARENT,), (1.0,), (key,))

    @cached_property
    def drafted(self) -> list[Drafted]:
        """The rows as a union of experts sees them."""
        return [Drafted(token, key) for token, key in zip(self.tokens, self.keys, strict=True)]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def children(self) -> tuple[dict[int, int], ...]:
        """For each row, token -> row of its children."""
        found: tuple[dict[int, int], ...] = tuple({} for _ in self.tokens)
        for row, parent in enumerate(self.parents[1:], start=1):
            found[parent][self.tokens[row]] = row
        return found

    @cached_property
    def depths(self) -> NDArray[np.int64]:
        """Distance from the root, int64 [N]; added to the root's position it is each row's
        position.
        """
        depths = np.zeros(len(self), dtype=np.int64)
        for row, parent in enumerate(self.parents[1:], start=1):
            depths[row] = depths[parent] + 1
        return depths

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Tree attention, bool [N, N]: row i sees column j where j is i or one of its ancestors."""
        mask = np.eye(len(self), dtype=np.bool_)
        for row, parent in enumerate(self.parents[1:], start=1):
            mask[row] |= mask[parent]
        return mask

    @property
    def leaves(self) -> int:
        """Rows without children; the root of an empty tree counts."""
        return len(self) - len(set(self.parents[1:]))

    @property
    def gain(self) -> float:
        """Expected tokens of the cycle: the bonus token and every node by its reach (paper 2a)."""
        return 1.0 + sum(self.reach[1:])

    def path(self, row: int) -> list[int]:
        """Rows from the root to `row`, both included."""
        rows = [row]
        while self.parents[rows[-1]] != ROOT_PARENT:
            rows.append(self.parents[rows[-1]])
        return rows[::-1]

    def subset(self, rows: Sequence[int]) -> TokenTree:
        """The tree of some rows only, in their order.

        Raises:
            ValueError: the rows leave out an ancestor of one of them, or are not in ascending
                order.
        """
        place = {row: index for index, row in enumerate(rows)}
        if 0 not in place or any(self.parents[row] not in place for row in rows if row):
            raise ValueError(f"rows {list(rows)} leave out an ancestor")
        return TokenTree(
            tuple(self.tokens[row] for row in rows),
            tuple(place[self.parents[row]] if row else ROOT_PARENT for row in rows),
            tuple(self.reach[row] for row in rows),
            tuple(self.keys[row] for row in rows),
        )
