"""The candidate tree: everything the draft has proposed after the current root, verified or not.

Keys are never reused, so a draft can keep its own state by key, and what was drafted beyond the
verified tree survives the step to the next root if the target went there.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lever_ext.tree.calibrate import Calibration, Candidates
from lever_ext.tree.token_tree import ROOT_PARENT, TokenTree


@dataclass
class Node:
    """A drafted token."""

    token: int
    parent: int
    """Key of the parent; -1 for the root."""
    step: float
    """Calibrated probability given that its parent is reached."""
    reach: float
    """Probability that verification reaches it."""
    depth: int
    candidates: Candidates | None = None
    """What the draft proposes after it; None until it is expanded."""
    children: list[int] = field(default_factory=list)


class CandidateTree:
    """Nodes by key, the root among them.

    Args:
        token: the sequence's last token.
        calibration: turns the draft's probabilities into reach.
    """

    def __init__(self, token: int, calibration: Calibration) -> None:
        self.calibration = calibration
        self._next = 0
        self.nodes: dict[int, Node] = {}
        self.root = self._new(token, ROOT_PARENT, 1.0, 1.0, 0)

    def _new(self, token: int, parent: int, step: float, reach: float, depth: int) -> int:
        key = self._next
        self._next += 1
        self.nodes[key] = Node(token, parent, step, reach, depth)
        return key

    def add(self, key: int, candidates: Candidates) -> None:
        """Expand a node with the draft's proposals. Mutates."""
        node = self.nodes[key]
        node.candidates = candidates
        for token, step in zip(candidates.tokens, self.calibration(candidates), strict=True):
            node.children.append(self._new(token, key, step, node.reach * step, node.depth + 1))

    def unexpanded(self, depth_limit: int, count: int) -> list[int]:
        """Up to `count` keys to expand for children no deeper than the limit, the likeliest reached
        first.
        """
        found = (
            key
            for key, node in self.nodes.items()
            if node.candidates is None and node.depth < depth_limit
        )
        return heapq.nsmallest(count, found, key=lambda key: (-self.nodes[key].reach, key))

    def path(self, key: int) -> list[int]:
        """Keys from the root to `key`, both included."""
        keys = [key]
        while keys[-1] != self.root:
            keys.append(self.nodes[keys[-1]].parent)
        return keys[::-1]

    def advance(self, accepted: Sequence[int], bonus: int) -> None:
        """Make the bonus token after the last accepted node the root; keep what was drafted after
        it.

        Args:
            accepted: keys from the root to the last accepted node.
            bonus: the token that the target chose after it.

        Mutates: reach and depth of what is kept; everything else is forgotten.
        """
        last = accepted[-1]
        found = next(
            (key for key in self.nodes[last].children if self.nodes[key].token == bonus), None
        )
        if found is None:
            self.nodes.clear()
            self.root = self._new(bonus, ROOT_PARENT, 1.0, 1.0, 0)
            return
        self.root = found
        self.nodes = {key: self.nodes[key] for key in self._below(found)}
        root = self.nodes[found]
        root.parent, root.step, root.reach, root.depth = ROOT_PARENT, 1.0, 1.0, 0
        for node in self.nodes.values():
            if node.parent != ROOT_PARENT:
                parent = self.nodes[node.parent]
                node.reach, node.depth = parent.reach * node.step, parent.depth + 1

    def _below(self, key: int) -> Iterator[int]:
        yield key
        for child in self.nodes[key].children:
            yield from self._below(child)

    def select(self, keys: Iterable[int]) -> TokenTree:
        """The token tree of the root and some nodes below it; ancestors must be among them."""
        rest = sorted(set(keys) - {self.root}, key=lambda key: (self.nodes[key].depth, key))
        order = [self.root, *rest]
        place = {key: row for row, key in enumerate(order)}
        nodes = [self.nodes[key] for key in order]
        return TokenTree(
            tuple(node.token for node in nodes),
            tuple(
                ROOT_PARENT if key == self.root else place[node.parent]
                for key, node in zip(order, nodes, strict=True)
            ),
            tuple(node.reach for node in nodes),
            tuple(order),
        )
