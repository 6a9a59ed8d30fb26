"""The paper's greedy rule as it stands (paper 2a), our policy's closest twin.

An example with a pass of 100 us and 10 us for each node, drafting for free:

    tree           G      C      G / C   best candidate's b / dC
    the            1.00   110    .0091   cat   .70 / 10 = .070   taken
    the cat        1.70   120    .0142   sat   .42 / 10 = .042   taken
    the cat sat    2.12   130    .0163   dog   .20 / 10 = .020   taken
    ... and dog    2.32   140    .0166   on    .12 / 10 = .012   stop

Where the time of a pass jumps at some node count, dC is large for one node, and the rule stops
there although several more nodes together would be worth the jump.
"""

from __future__ import annotations

from dataclasses import dataclass

from lever_ext.tree.fixed_trees import children_within
from lever_ext.tree.growth import Growth
from lever_ext.tree.token_tree import DraftedToken, TokenTree


@dataclass(frozen=True)
class GainCostGreedy:
    """Take the node with the best b / dC, drafting each node taken, until it falls below G / C.

    b is a node's reach and dC what it adds to the cycle's time; G and C are the gain and the time
    of the tree so far.
    """

    name: str = "greedy"

    def build(self, growth: Growth) -> TokenTree:
        tree = _GreedyTree(growth)
        while tree.frontier and len(tree.chosen) < growth.max_nodes:
            now = tree.cycle_us()
            ratio, key = max(tree.ratio(key, now) for key in tree.frontier)
            if ratio <= tree.gain / now:
                break
            tree.take(-key)
        return growth.tree.select(tree.chosen)


class _GreedyTree:
    """The nodes taken so far and those that may follow.

    Args:
        growth: of the cycle. Mutates: the nodes that are taken are expanded.
    """

    def __init__(self, growth: Growth) -> None:
        root = growth.tree.root
        growth.expand([root])
        self.chosen = [root]
        """Keys of the nodes taken, the root first."""
        self.frontier = list(growth.tree.nodes[root].children)
        """Keys of their children that are not taken."""
        self.gain = 1.0
        """Expected tokens of the cycle."""
        self._growth = growth
        self._inner: set[int] = set()
        """Nodes with a child in the tree."""
        self._leaves = 1
        self._union = growth.cost.union.start()
        self._union_us = self._union.add(self._drafted(root))

    def cycle_us(self) -> float:
        """Predicted microseconds of a cycle with this tree."""
        cost = self._growth.cost
        verify_us = cost.verify(len(self.chosen), self._leaves)
        return cost.fixed_us + self._growth.spent_us + verify_us + self._union_us

    def ratio(self, key: int, now: float) -> tuple[float, int]:
        """(b / dC of a node, minus its key: the first of equal ones is the largest pair).

        Args:
            now: `cycle_us`.
        """
        cost = self._growth.cost
        node = self._growth.tree.nodes[key]
        drafting = cost.draft_us(1) if node.candidates is None else 0.0
        leaves = self._leaves + (node.parent in self._inner)
        verify_us = cost.verify(len(self.chosen) + 1, leaves)
        after = verify_us + self._union.peek(self._drafted(key))
        extra = cost.fixed_us + self._growth.spent_us + drafting + after - now
        return node.reach / max(extra, 1e-9), -key

    def take(self, key: int) -> None:
        """Add a node of the frontier and draft its children. Mutates."""
        node = self._growth.tree.nodes[key]
        self.frontier.remove(key)
        self._leaves += node.parent in self._inner
        self._inner.add(node.parent)
        self.chosen.append(key)
        self.gain += node.reach
        self._union_us = self._union.add(self._drafted(key))
        self._growth.expand([key])
        self.frontier += children_within(self._growth, key)

    def _drafted(self, key: int) -> DraftedToken:
        return DraftedToken(self._growth.tree.nodes[key].token, key)
