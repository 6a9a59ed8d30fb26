"""One cycle's drafting: the candidate tree, the draft that expands it, and the clock on what that
costs.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence

import numpy as np

from lever_ext.tree.calibrate import Candidates
from lever_ext.tree.candidates import CandidateTree
from lever_ext.tree.cost import CycleCost, Drafted
from lever_ext.tree.select import Known, Selection
from lever_ext.tree.token_tree import ROOT_PARENT, TokenTree

Expander = Callable[[CandidateTree, Sequence[int]], list[Candidates]]


class Growth:
    """What a tree policy may see and do in one cycle.

    Args:
        tree: candidates after the current root; what an earlier cycle drafted is in it already.
        expand: the draft.
        cost: predictions; its draft times learn from what is measured here.
        depth_limit: deeper nodes could never be accepted, for the length limit or the context's
            end.
        max_rows: rows that a target pass may have.
    """

    def __init__(
        self,
        tree: CandidateTree,
        expand: Expander,
        cost: CycleCost,
        depth_limit: int = 64,
        max_rows: int = 128,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tree = tree
        self.cost = cost
        self.depth_limit = depth_limit
        self.max_rows = max_rows
        self.spent_us = 0.0
        self.calls = 0
        self.nodes = 0
        self._expand = expand
        self._clock = clock

    def expand(self, keys: Sequence[int]) -> None:
        """Draft the children of some nodes in one call; nodes expanded before or too deep are left
        out. Mutates.
        """
        nodes = self.tree.nodes
        keys = [
            key
            for key in keys
            if nodes[key].candidates is None and nodes[key].depth < self.depth_limit
        ]
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

    def known(self) -> tuple[Known, list[int]]:
        """The likeliest candidates as rows, and the key of each row.

        Three times as many as a pass may have rows: what is drafted ahead leaves thousands that no
        tree would take.
        """
        nodes = self.tree.nodes
        within = (key for key, node in nodes.items() if node.depth <= self.depth_limit)
        # A parent is reached at least as often as its children, and has the smaller key: none is
        # left out.
        keys = heapq.nsmallest(3 * self.max_rows, within, key=lambda key: (-nodes[key].reach, key))
        keys.sort(key=lambda key: (nodes[key].depth, key))
        place = {key: row for row, key in enumerate(keys)}
        parents = [
            place[nodes[key].parent] if key != self.tree.root else ROOT_PARENT for key in keys
        ]
        reach = np.array([nodes[key].reach for key in keys])
        return Known(
            np.array(parents), reach, [Drafted(nodes[key].token, key) for key in keys]
        ), keys

    def chosen(self, selection: Selection, keys: Sequence[int]) -> TokenTree:
        return self.tree.select(keys[row] for row in selection.rows)
