"""Tree policies: how far to draft and what to verify. `lever` is ours; the others are its plain
twins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.errors import ConfigError
from lever_ext.tree.cost import Drafted
from lever_ext.tree.growth import Growth
from lever_ext.tree.select import Known, Selection, best_prefix, best_subtree
from lever_ext.tree.token_tree import TokenTree

POLICIES = ("lever", "greedy", "opt_tree", "specinfer", "fixed", "chain", "none")


class TreePolicy(Protocol):
    """Builds the token tree of a cycle."""

    @property
    def name(self) -> str:
        """As `make_policy` knows it."""
        ...

    def build(self, growth: Growth) -> TokenTree:
        """Draft as far as the policy wants and choose. Mutates: the growth."""
        ...


@dataclass(frozen=True)
class NoSpeculation:
    """Plain decoding: the root alone."""

    name: str = "none"

    def build(self, growth: Growth) -> TokenTree:
        return growth.tree.select([growth.tree.root])


@dataclass(frozen=True)
class Chain:
    """The draft's likeliest token, `length` times."""

    length: int = 8
    name: str = "chain"

    def build(self, growth: Growth) -> TokenTree:
        return _by_widths(growth, (1,) * self.length)


@dataclass(frozen=True)
class SpecInferTree:
    """A fixed shape: how many children each node has, by depth (SpecInfer's published
    expansion).
    """

    widths: tuple[int, ...] = (1, 1, 3, 1, 1, 1, 1, 1)
    name: str = "specinfer"

    def build(self, growth: Growth) -> TokenTree:
        return _by_widths(growth, self.widths)


@dataclass(frozen=True)
class FixedBudget:
    """The `budget` likeliest nodes, best first, one draft call for each node expanded."""

    budget: int = 16
    name: str = "fixed"

    def build(self, growth: Growth) -> TokenTree:
        nodes = growth.tree.nodes
        chosen, frontier = [growth.tree.root], list[int]()
        size = min(self.budget, growth.max_rows - 1)
        growth.expand([growth.tree.root])
        frontier += nodes[growth.tree.root].children
        while frontier and len(chosen) <= size:
            key = max(frontier, key=lambda candidate: (nodes[candidate].reach, -candidate))
            frontier.remove(key)
            chosen.append(key)
            if len(chosen) <= size:
                growth.expand([key])
                frontier += [
                    child
                    for child in nodes[key].children
                    if nodes[child].depth <= growth.depth_limit
                ]
        return growth.tree.select(chosen)


@dataclass(frozen=True)
class OptTree:
    """Layer by layer, the `budget` likeliest nodes of each; stop when the best tree of that size
    gains little.

    After OPT-Tree: the tree with the largest expected acceptance length for a node budget, cost
    unseen.
    """

    budget: int = 16
    least_gain: float = 0.2
    name: str = "opt_tree"

    def build(self, growth: Growth) -> TokenTree:
        nodes = growth.tree.nodes
        layer, gain = [growth.tree.root], 0.0
        size = min(self.budget, growth.max_rows - 1)
        while layer:
            growth.expand(layer)
            below = [child for key in layer for child in nodes[key].children]
            layer = sorted(below, key=lambda key: (-nodes[key].reach, key))[:size]
            reached = sum(
                sorted((node.reach for node in nodes.values()), reverse=True)[1 : size + 1]
            )
            if reached - gain < self.least_gain:
                break
            gain = reached
            layer = [key for key in layer if nodes[key].depth < growth.depth_limit]
        kept = [key for key, node in nodes.items() if node.depth <= growth.depth_limit]
        kept.sort(key=lambda key: (-nodes[key].reach, nodes[key].depth, key))
        return growth.tree.select(kept[: size + 1])


@dataclass(frozen=True)
class GainCostGreedy:
    """The paper's rule as it stands: take the best b / dC, drafting each node taken, until it falls
    below G / C.
    """

    name: str = "greedy"

    def build(self, growth: Growth) -> TokenTree:
        nodes, cost = growth.tree.nodes, growth.cost
        growth.expand([growth.tree.root])
        chosen, frontier = [growth.tree.root], list(nodes[growth.tree.root].children)
        parents = set[int]()
        leaves, gain = 1, 1.0
        union = cost.union.start()
        union_us = union.add(Drafted(nodes[growth.tree.root].token, growth.tree.root))
        while frontier and len(chosen) < growth.max_rows:
            now = cost.fixed_us + growth.spent_us + cost.verify(len(chosen), leaves) + union_us
            ranked = []
            for key in frontier:
                node = nodes[key]
                drafting = cost.draft_us(1) if node.candidates is None else 0.0
                after = cost.verify(
                    len(chosen) + 1, leaves + (node.parent in parents)
                ) + union.peek(Drafted(node.token, key))
                extra = cost.fixed_us + growth.spent_us + drafting + after - now
                ranked.append((node.reach / max(extra, 1e-9), -key))
            ratio, key = max(ranked)
            if ratio <= gain / now:
                break
            key = -key
            frontier.remove(key)
            leaves += nodes[key].parent in parents
            parents.add(nodes[key].parent)
            chosen.append(key)
            gain += nodes[key].reach
            union_us = union.add(Drafted(nodes[key].token, key))
            growth.expand([key])
            frontier += [
                child for child in nodes[key].children if nodes[child].depth <= growth.depth_limit
            ]
        return growth.tree.select(chosen)


@dataclass(frozen=True)
class Lever:
    """Gain over cost without a stall at shape buckets: draft in batches while that is predicted to
    pay, then scan.

    Args:
        widths: batch sizes that a draft call may have.
        horizons: draft calls to imagine ahead, the nearest first: a bucket's edge is crossed only
            by several.
    """

    widths: tuple[int, ...] = (1, 2, 4, 8, 16)
    horizons: tuple[int, ...] = (1, 4, 10)
    name: str = "lever"

    def build(self, growth: Growth) -> TokenTree:
        max_rows = growth.cost.largest_tree(growth.max_rows)
        growth.expand([growth.tree.root])
        while True:
            known, keys = growth.known()
            best = best_prefix(known, growth.cost, growth.spent_us, max_rows)
            batch = self._batch(growth, known, keys, best, max_rows)
            if not batch:
                break
            growth.expand(batch)
        return growth.chosen(best_subtree(known, growth.cost, growth.spent_us, max_rows), keys)

    def _batch(
        self, growth: Growth, known: Known, keys: Sequence[int], best: Selection, max_rows: int
    ) -> list[int]:
        """The nodes whose drafting promises the most beyond the best tree so far; none if nothing
        does.
        """
        value = best.value
        # No call makes a tree so much larger.
        max_rows = min(max_rows, 2 * len(best.rows) + 32)
        place = {key: row for row, key in enumerate(keys)}
        open_keys = growth.tree.unexpanded(growth.depth_limit, max(self.widths))
        open_keys = [key for key in open_keys if key in place]
        ranks = growth.tree.calibration.ranks
        found: list[int] = []
        if not len(ranks):
            return found
        for horizon in self.horizons:
            for width in self.widths:
                batch = open_keys[:width]
                if len(batch) < width:
                    break
                imagined = _imagine(known, [place[key] for key in batch], ranks, horizon)
                spent = growth.spent_us + horizon * growth.cost.draft_us(len(batch))
                promise = best_prefix(imagined, growth.cost, spent, max_rows).value
                if promise > value + 1e-6 * abs(value):
                    value, found = promise, batch
            if found:
                break
        return found


def _imagine(known: Known, rows: Sequence[int], ranks: NDArray[np.float64], levels: int) -> Known:
    """The candidates with typical children, not drafted yet, under some of them; the likeliest
    child prolongs each.
    """
    starts, width = np.asarray(rows), len(ranks)
    first = len(known.parents) + width * np.arange(len(starts) * levels).reshape(
        len(starts), levels
    )
    # Each level hangs from the first child of the level above.
    above = np.concatenate([starts[:, None], first[:, :-1]], axis=1)
    shares = np.power(ranks[0], np.arange(levels))[:, None] * ranks
    reach = np.asarray(known.reach)[starts][:, None, None] * shares
    # Its parent's token stands in for the unknown one where experts are priced.
    drafted = list(known.drafted)
    for row in rows:
        drafted += [Drafted(known.drafted[row].token)] * (width * levels)
    return Known(
        np.concatenate([known.parents, np.repeat(above.ravel(), width)]),
        np.concatenate([known.reach, reach.ravel()]),
        drafted,
    )


def _by_widths(growth: Growth, widths: Sequence[int]) -> TokenTree:
    """Expand depth by depth, `widths[depth]` children for each node, one draft call a depth."""
    nodes = growth.tree.nodes
    chosen, layer = [growth.tree.root], [growth.tree.root]
    for width in widths[: growth.depth_limit]:
        room = growth.max_rows - len(chosen)
        growth.expand(layer)
        layer = [child for key in layer for child in nodes[key].children[:width]][: max(0, room)]
        chosen += layer
    return growth.tree.select(chosen)


def make_policy(name: str, size: int | None = None) -> TreePolicy:
    """The tree policy of that name.

    Args:
        size: chain length or node budget of those that have one.

    Raises:
        ConfigError: unknown name, or a size below 1.
    """
    if size is not None and size < 1:
        raise ConfigError(f"tree size: expected at least 1, found {size}")
    if name not in POLICIES:
        raise ConfigError(f"tree: expected one of {', '.join(POLICIES)}, found {name!r}")
    sized: dict[str, type[Chain] | type[FixedBudget] | type[OptTree]] = {
        "chain": Chain,
        "fixed": FixedBudget,
        "opt_tree": OptTree,
    }
    if name in sized:
        return sized[name](size) if size is not None else sized[name]()
    plain: dict[str, TreePolicy] = {
        "lever": Lever(),
        "greedy": GainCostGreedy(),
        "specinfer": SpecInferTree(),
        "none": NoSpeculation(),
    }
    return plain[name]
