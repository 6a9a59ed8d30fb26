"""The token tree that one target pass verifies: frozen, parents before children, root first.

Nodes are numbered in the order of the tree's arrays; the root is node 0. The pass computes one row
of every matrix for each node, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROOT_PARENT = -1


class DraftedToken(NamedTuple):
    """What the cost of expert reads depends on: a node's token, and the node's own forecast."""

    token: int
    node: int = -1
    """Key of the node in the candidate tree; -1 for an imagined node."""


@dataclass(frozen=True)
class TokenTree:
    """Drafted continuations of a sequence.

    The root is the sequence's last token, whose KV entry is still missing.

        node  token  parent  depth  sees            the
        0     the    -1      0      0               |- cat
        1     cat    0       1      0 1             |  `- sat
        2     dog    0       1      0 2             |     `- on
        3     sat    1       2      0 1 3           `- dog
        4     on     3       3      0 1 3 4

    Args:
        tokens: token id of each of the N nodes.
        parents: number of each node's parent, smaller than its own; -1 for the root alone.
        reach: probability that verification reaches the node; 1 for the root.
        keys: the node's key in the candidate tree, by which the draft knows it.

    Raises:
        ValueError: no nodes, unequal lengths, a parent that does not come before its child, or two
            children of one parent with the same token.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    reach: tuple[float, ...]
    keys: tuple[int, ...]

    def __post_init__(self) -> None:
        size = len(self.tokens)
        lengths = {len(self.parents), len(self.reach), len(self.keys)}
        if not size or lengths != {size}:
            raise ValueError(
                "a token tree needs at least its root, and one parent, reach and key for each token"
            )
        in_order = all(0 <= parent < node for node, parent in enumerate(self.parents[1:], start=1))
        if self.parents[0] != ROOT_PARENT or not in_order:
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
    def drafted(self) -> list[DraftedToken]:
        """The nodes, the root included, as the cost of expert reads sees them."""
        pairs = zip(self.tokens, self.keys, strict=True)
        return [DraftedToken(token, key) for token, key in pairs]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def children(self) -> tuple[dict[int, int], ...]:
        """For each node, token -> number of its children."""
        found: tuple[dict[int, int], ...] = tuple({} for _ in self.tokens)
        for node, parent in enumerate(self.parents[1:], start=1):
            token = self.tokens[node]
            found[parent][token] = node
        return found

    @cached_property
    def depths(self) -> NDArray[np.int64]:
        """Distance from the root, int64 [N]. Added to the root's position, a node's position."""
        depths = np.zeros(len(self), dtype=np.int64)
        for node, parent in enumerate(self.parents[1:], start=1):
            depths[node] = depths[parent] + 1
        return depths

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Tree attention, bool [N, N]: node i sees node j where j is i or one of its ancestors."""
        mask = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask[node] |= mask[parent]
        return mask

    @property
    def leaves(self) -> int:
        """Nodes without children; the root of an empty tree counts."""
        inner = set(self.parents[1:])
        return len(self) - len(inner)

    @property
    def gain(self) -> float:
        """Expected tokens of the cycle: the bonus token and every node by its reach (paper 2a)."""
        return 1.0 + sum(self.reach[1:])

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        nodes = [node]
        while self.parents[nodes[-1]] != ROOT_PARENT:
            parent = self.parents[nodes[-1]]
            nodes.append(parent)
        return nodes[::-1]

    def subset(self, nodes: Sequence[int]) -> TokenTree:
        """The tree of some nodes only, in their order.

        Raises:
            ValueError: an ancestor of one of the nodes is left out, or they are not in ascending
                order.
        """
        number = {node: new for new, node in enumerate(nodes)}
        below_root = [node for node in nodes if node]
        if 0 not in number or any(self.parents[node] not in number for node in below_root):
            raise ValueError(f"nodes {list(nodes)} leave out an ancestor")
        parents = [number[self.parents[node]] if node else ROOT_PARENT for node in nodes]
        return TokenTree(
            tokens=tuple(self.tokens[node] for node in nodes),
            parents=tuple(parents),
            reach=tuple(self.reach[node] for node in nodes),
            keys=tuple(self.keys[node] for node in nodes),
        )
