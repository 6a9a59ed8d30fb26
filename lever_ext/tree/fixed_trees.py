"""Tree policies with a given shape or node budget: what `lever` is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lever_ext.tree.growth import Growth
from lever_ext.tree.token_tree import TokenTree


@dataclass(frozen=True)
class NoSpeculation:
    """Plain decoding: the root alone."""

    name: str = "none"

    def build(self, growth: Growth) -> TokenTree:
        return growth.tree.select([growth.tree.root])


@dataclass(frozen=True)
class Chain:
    """The draft's likeliest token, `length` times.

    Args:
        length: drafted nodes, without the root.
    """

    length: int = 8
    name: str = "chain"

    def build(self, growth: Growth) -> TokenTree:
        return _by_widths(growth, (1,) * self.length)


@dataclass(frozen=True)
class SpecInferTree:
    """A fixed shape (SpecInfer's published expansion).

    Args:
        widths: children of each node, by depth. (1, 1, 3, 1) is a chain of 2 nodes, then 3 branches
            of 2 nodes each.
    """

    widths: tuple[int, ...] = (1, 1, 3, 1, 1, 1, 1, 1)
    name: str = "specinfer"

    def build(self, growth: Growth) -> TokenTree:
        return _by_widths(growth, self.widths)


@dataclass(frozen=True)
class FixedBudget:
    """The `budget` likeliest nodes, best first, one draft call for each node expanded.

    Args:
        budget: drafted nodes, without the root.
    """

    budget: int = 16
    name: str = "fixed"

    def build(self, growth: Growth) -> TokenTree:
        tree = growth.tree
        size = min(self.budget, growth.max_nodes - 1)
        chosen = [tree.root]
        growth.expand([tree.root])
        frontier = list(tree.nodes[tree.root].children)
        while frontier and len(chosen) <= size:
            key = min(frontier, key=tree.likeliest_first)
            frontier.remove(key)
            chosen.append(key)
            if len(chosen) <= size:
                growth.expand([key])
                frontier += children_within(growth, key)
        return tree.select(chosen)


@dataclass(frozen=True)
class OptTree:
    """The tree with the largest expected acceptance length for a node budget, cost unseen.

    After OPT-Tree. Layer by layer the `budget` likeliest nodes are expanded, until a layer adds
    less than `least_gain` to what the best tree of that size gains.

    Args:
        budget: drafted nodes, without the root.
        least_gain: expected tokens.
    """

    budget: int = 16
    least_gain: float = 0.2
    name: str = "opt_tree"

    def build(self, growth: Growth) -> TokenTree:
        nodes = growth.tree.nodes
        size = min(self.budget, growth.max_nodes - 1)
        layer = [growth.tree.root]
        gain = 0.0
        while layer:
            growth.expand(layer)
            layer = _children(growth, layer)
            layer = sorted(layer, key=growth.tree.likeliest_first)[:size]
            new_gain = self._gain(growth, size)
            if new_gain - gain < self.least_gain:
                break
            gain = new_gain
            layer = [key for key in layer if nodes[key].depth < growth.depth_limit]
        return self._best(growth, size)

    @staticmethod
    def _gain(growth: Growth, size: int) -> float:
        """Expected accepted tokens of the `size` likeliest nodes; the root is not one of them."""
        reach = [node.reach for node in growth.tree.nodes.values()]
        return sum(sorted(reach, reverse=True)[1 : size + 1])

    @staticmethod
    def _best(growth: Growth, size: int) -> TokenTree:
        """The tree of the `size` likeliest nodes and the root."""
        nodes = growth.tree.nodes
        keys = [key for key, node in nodes.items() if node.depth <= growth.depth_limit]
        keys.sort(key=lambda key: (-nodes[key].reach, nodes[key].depth, key))
        return growth.tree.select(keys[: size + 1])


def children_within(growth: Growth, key: int) -> list[int]:
    """A node's children that are not deeper than the growth's limit."""
    nodes = growth.tree.nodes
    return [child for child in nodes[key].children if nodes[child].depth <= growth.depth_limit]


def _children(growth: Growth, keys: Sequence[int], width: int | None = None) -> list[int]:
    """The children of some nodes.

    Args:
        width: only the first so many of each node.
    """
    found: list[int] = []
    for key in keys:
        found += growth.tree.nodes[key].children[:width]
    return found


def _by_widths(growth: Growth, widths: Sequence[int]) -> TokenTree:
    """Expand depth by depth, one draft call for each depth.

    Args:
        widths: children of each node, by depth.
    """
    chosen = [growth.tree.root]
    layer = [growth.tree.root]
    for width in widths[: growth.depth_limit]:
        room = max(0, growth.max_nodes - len(chosen))
        growth.expand(layer)
        layer = _children(growth, layer, width)[:room]
        chosen += layer
    return growth.tree.select(chosen)
