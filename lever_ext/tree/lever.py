"""Our tree policy: gain over cost, without a stall at the edges of shape buckets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lever_ext.tree.candidate_set import CandidateSet, Selection
from lever_ext.tree.growth import Growth
from lever_ext.tree.prefix import best_prefix
from lever_ext.tree.select import best_subtree
from lever_ext.tree.token_tree import DraftedToken, TokenTree

LEAST_PROMISE = 1e-6
"""Share of the best tree's value that further drafting must promise on top."""


@dataclass(frozen=True)
class Lever:
    """Draft in batches while that is predicted to be worth it, then choose the best subtree.

    What a batch is worth is predicted by imagining children under its nodes, as likely as children
    were on average:

        drafted so far          imagined: batch of 1 node, horizon of 2 calls

        the                     the
        |- cat .70              |- cat .70
        |  `- sat .42           |  `- sat .42
        `- dog .20              |     |- (.6) .25
                                |     |  |- (.6) .15
                                |     |  `- (.2) .05
                                |     `- (.2) .08
                                `- dog .20

    The batch is drafted if the best prefix of the imagined candidates, less the time of 2 draft
    calls, is worth more than the best one so far.

    Args:
        widths: batch sizes that a draft call may have.
        horizons: draft calls to imagine ahead, the nearest first: the edge of a bucket is crossed
            only by several.
    """

    widths: tuple[int, ...] = (1, 2, 4, 8, 16)
    horizons: tuple[int, ...] = (1, 4, 10)
    name: str = "lever"

    def build(self, growth: Growth) -> TokenTree:
        max_nodes = growth.cost.largest_tree(growth.max_nodes)
        growth.expand([growth.tree.root])
        while True:
            candidates = growth.candidate_set()
            best = best_prefix(candidates, growth.cost, growth.spent_us, max_nodes)
            batch = self._batch(growth, candidates, best, max_nodes)
            if not batch:
                break
            growth.expand(batch)
        selection = best_subtree(candidates, growth.cost, growth.spent_us, max_nodes)
        return growth.chosen(candidates, selection)

    def _batch(
        self,
        growth: Growth,
        candidates: CandidateSet,
        best: Selection,
        max_nodes: int,
    ) -> list[int]:
        """Keys of the nodes whose drafting promises most beyond `best`; none if nothing does."""
        ranks = growth.tree.calibration.ranks
        if not len(ranks):
            return []
        # No call makes a tree so much larger.
        max_nodes = min(max_nodes, 2 * len(best.nodes) + 32)
        number = {drafted.node: node for node, drafted in enumerate(candidates.drafted)}
        frontier = growth.tree.unexpanded(growth.depth_limit, max(self.widths))
        frontier = [key for key in frontier if key in number]
        value = best.value
        found: list[int] = []
        for horizon in self.horizons:
            for width in self.widths:
                batch = frontier[:width]
                if len(batch) < width:
                    break
                parents = np.array([number[key] for key in batch])
                imagined = _imagine(candidates, parents, ranks, horizon)
                spent_us = growth.spent_us + horizon * growth.cost.draft_us(width)
                promise = best_prefix(imagined, growth.cost, spent_us, max_nodes).value
                if promise > value + LEAST_PROMISE * abs(value):
                    value, found = promise, batch
            if found:
                break
        return found


def _imagine(
    candidates: CandidateSet,
    nodes: NDArray[np.int64],
    ranks: NDArray[np.float64],
    levels: int,
) -> CandidateSet:
    """The candidates with typical children, not drafted yet, below some of them.

    Args:
        candidates: the candidate set.
        nodes: those that get children, int64 [B].
        ranks: typical probabilities of children, float64 [W].
        levels: generations of children; each hangs from the likeliest child of the one above.
    """
    width = len(ranks)
    count = len(nodes) * levels
    # First child of each generation, [B, levels].
    numbers = len(candidates.parents) + width * np.arange(count)
    first = numbers.reshape(len(nodes), levels)
    above = np.concatenate([nodes[:, None], first[:, :-1]], axis=1)
    # Reach of each child given its node, [levels, W].
    likeliest = np.power(ranks[0], np.arange(levels))
    shares = likeliest[:, None] * ranks
    reach = np.asarray(candidates.reach)[nodes][:, None, None] * shares
    # The parent's token stands in for the unknown one where experts are priced.
    drafted = list(candidates.drafted)
    for node in nodes.tolist():
        token = candidates.drafted[node].token
        drafted += [DraftedToken(token)] * (width * levels)
    return CandidateSet(
        parents=np.concatenate([candidates.parents, np.repeat(above.ravel(), width)]),
        reach=np.concatenate([candidates.reach, reach.ravel()]),
        drafted=drafted,
    )
