"""The candidate tree: everything that the draft has proposed after the current root.

Keys are never reused, so a draft can keep its own state by key. What was drafted beyond the
verified tree survives the step to the next root if the target went there.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lever_ext.tree.calibrate import Calibration, Candidates
from lever_ext.tree.token_tree import ROOT_PARENT, TokenTree


@dataclass
class CandidateNode:
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

    Each line below is a node: key, token, reach. When the target chooses "cat" after "the", what
    was drafted after "cat" stays, with its keys, and is reached with the probability of its own
    steps alone:

        0 the  1.0                        1 cat  1.0
        |- 1 cat  0.6                     |- 3 sat  0.5
        |  |- 3 sat  0.3     advance      `- 4 ran  0.2
        |  `- 4 ran  0.12    ------->
        `- 2 dog  0.3

    Args:
        token: the sequence's last token.
        calibration: turns the draft's probabilities into reach.
    """

    def __init__(self, token: int, calibration: Calibration) -> None:
        self.calibration = calibration
        self._next = 0
        self.nodes: dict[int, CandidateNode] = {}
        self.root = self._new(token, ROOT_PARENT, 1.0, 1.0, 0)

    def _new(
        self,
        token: int,
        parent: int,
        step: float,
        reach: float,
        depth: int,
    ) -> int:
        """Add a node; its key."""
        key = self._next
        self._next += 1
        self.nodes[key] = CandidateNode(token, parent, step, reach, depth)
        return key

    def add(self, key: int, candidates: Candidates) -> None:
        """Expand a node with the draft's proposals. Mutates."""
        node = self.nodes[key]
        node.candidates = candidates
        steps = self.calibration(candidates)
        for token, step in zip(candidates.tokens, steps, strict=True):
            reach = node.reach * step
            child = self._new(token, key, step, reach, node.depth + 1)
            node.children.append(child)

    def unexpanded(self, depth_limit: int, count: int) -> list[int]:
        """Up to `count` keys of nodes to expand, the likeliest reached first.

        Args:
            depth_limit: their children are no deeper than this.
        """
        found = [
            key
            for key, node in self.nodes.items()
            if node.candidates is None and node.depth < depth_limit
        ]
        return heapq.nsmallest(count, found, key=self.likeliest_first)

    def likeliest_first(self, key: int) -> tuple[float, int]:
        """Sort key by reach; among equals the node that was drafted first."""
        return -self.nodes[key].reach, key

    def path(self, key: int) -> list[int]:
        """Keys from the root to `key`, both included."""
        keys = [key]
        while keys[-1] != self.root:
            parent = self.nodes[keys[-1]].parent
            keys.append(parent)
        return keys[::-1]

    def advance(self, accepted: Sequence[int], bonus: int) -> None:
        """Make the bonus token after the last accepted node the root.

        Args:
            accepted: keys from the root to the last accepted node.
            bonus: the token that the target chose after it.

        Mutates: reach and depth of what was drafted after the bonus token; everything else is
        forgotten.
        """
        children = self.nodes[accepted[-1]].children
        found = next((key for key in children if self.nodes[key].token == bonus), None)
        if found is None:
            self.nodes.clear()
            self.root = self._new(bonus, ROOT_PARENT, 1.0, 1.0, 0)
            return
        self.root = found
        self.nodes = {key: self.nodes[key] for key in self._below(found)}
        root = self.nodes[found]
        root.parent, root.depth = ROOT_PARENT, 0
        root.step = root.reach = 1.0
        for node in self.nodes.values():
            if node.parent != ROOT_PARENT:
                parent = self.nodes[node.parent]
                node.reach = parent.reach * node.step
                node.depth = parent.depth + 1

    def _below(self, key: int) -> Iterator[int]:
        """The node and all below it, parents first."""
        yield key
        for child in self.nodes[key].children:
            yield from self._below(child)

    def select(self, keys: Iterable[int]) -> TokenTree:
        """The token tree of the root and some nodes below it; ancestors must be among them."""
        below_root = set(keys) - {self.root}
        order = sorted(below_root, key=lambda key: (self.nodes[key].depth, key))
        order.insert(0, self.root)
        number = {key: node for node, key in enumerate(order)}
        nodes = [self.nodes[key] for key in order]
        parents = [number[node.parent] for node in nodes[1:]]
        return TokenTree(
            tokens=tuple(node.token for node in nodes),
            parents=(ROOT_PARENT, *parents),
            reach=tuple(node.reach for node in nodes),
            keys=tuple(order),
        )
