"""One cycle's drafting: the candidate tree, the draft that expands it, and what that costs."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence

import numpy as np

from lever_ext.tree.calibrate import Candidates
from lever_ext.tree.candidate_set import CandidateSet, Selection
from lever_ext.tree.candidates import CandidateTree
from lever_ext.tree.cost import CycleCost
from lever_ext.tree.token_tree import ROOT_PARENT, DraftedToken, TokenTree

Expander = Callable[[CandidateTree, Sequence[int]], list[Candidates]]
"""The draft's proposals after some nodes of a tree."""

SURPLUS = 3
"""Candidates that are looked at for each node that a pass may have."""


class Growth:
    """What a tree policy may see and do in one cycle.

    Args:
        tree: candidates after the current root; what an earlier cycle drafted is in it already.
        expand: the draft.
        cost: predictions; its draft times learn from what is measured here.
        depth_limit: deeper nodes could never be accepted, for the length limit or the context's
            end.
        max_nodes: nodes that a target pass may have.
        clock: seconds; replaced by tests.
    """

    def __init__(
        self,
        tree: CandidateTree,
        expand: Expander,
        cost: CycleCost,
        depth_limit: int = 64,
        max_nodes: int = 128,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tree = tree
        self.cost = cost
        self.depth_limit = depth_limit
        self.max_nodes = max_nodes
        self.spent_us = 0.0
        """Time of all draft calls so far."""
        self.calls = 0
        self.nodes = 0
        """Nodes that were expanded."""
        self._expand = expand
        self._clock = clock

    def expand(self, keys: Sequence[int]) -> None:
        """Draft the children of some nodes in one call. Mutates.

        Nodes that were expanded before, or that are too deep, are left out.
        """
        keys = [key for key in keys if self._may_expand(key)]
        if not keys:
            return
        start = self._clock()
        proposals = self._expand(self.tree, keys)
        us = (self._clock() - start) * 1e6
        self.spent_us += us
        self.calls += 1
        self.nodes += len(keys)
        self.cost.observe_draft(len(keys), us)
        for key, candidates in zip(keys, proposals, strict=True):
            self.tree.add(key, candidates)

    def candidate_set(self) -> CandidateSet:
        """The likeliest candidates, by depth.

        Not all of them: what is drafted ahead leaves thousands that no tree would take.
        """
        nodes = self.tree.nodes
        within = [key for key, node in nodes.items() if node.depth <= self.depth_limit]
        # A parent is reached at least as often as its children, and has the smaller key: none is
        # left out.
        keys = heapq.nsmallest(
            SURPLUS * self.max_nodes,
            within,
            key=self.tree.likeliest_first,
        )
        keys.sort(key=lambda key: (nodes[key].depth, key))
        number = {key: node for node, key in enumerate(keys)}
        parents = [number[nodes[key].parent] for key in keys[1:]]
        reach = [nodes[key].reach for key in keys]
        return CandidateSet(
            parents=np.array([ROOT_PARENT, *parents]),
            reach=np.array(reach),
            drafted=[DraftedToken(nodes[key].token, key) for key in keys],
        )

    def chosen(self, candidates: CandidateSet, selection: Selection) -> TokenTree:
        """The token tree of a selection from the candidate set."""
        return self.tree.select(candidates.drafted[node].node for node in selection.nodes)

    def _may_expand(self, key: int) -> bool:
        node = self.tree.nodes[key]
        return node.candidates is None and node.depth < self.depth_limit
