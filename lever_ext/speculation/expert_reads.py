"""Expert reads of an MoE target: what each pass selected, and what the next tree's will cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.weights.layer_weights import chosen_experts
from lever_ext.flash.experts import FlashExpertCache
from lever_ext.speculation.verify import Verified
from lever_ext.target import FlashTarget
from lever_ext.tree.expert_union import FADING, RECENT, ExpertUnion
from lever_ext.tree.token_tree import TokenTree

NODE_US = 1000.0
"""Of compute for a further node, until passes are measured."""
BYTES_PER_US = 2e3
"""Of reads from flash, until passes are measured: two gigabytes per second."""
HELD_NODES, HELD_READS = 32.0, 30.0
"""Nodes and reads of the two imagined passes that hold the fit near its start."""
FORECAST_STEP = 0.05
"""Weight of a node in the moving average of right forecasts."""


class _Pass(NamedTuple):
    """What a pass did."""

    nodes: float
    reads: float
    """Experts."""
    us: float


@dataclass
class ExpertReads:
    """Keeps a tree's expert-union cost in step with the target's cache and routing.

    The time of a pass is fitted to recent ones as

        fixed + nodes * per node + reads * per read

    A table over shapes, as for dense targets, would mix the cost of nodes with that of the experts
    they happened to need.
    """

    cache: FlashExpertCache
    union: ExpertUnion
    seen_reads: int = 0
    """Of the cache's counter, at the last `count`."""
    fixed_us: float = 0.0
    node_us: float = NODE_US
    start_read_us: float = 0.0
    """Of an expert, until passes are measured."""
    forecast_share: float = 0.8
    """Moving average of the share of chosen experts that were forecast."""
    _routing: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    """Node -> its forecast, ids [L, K]."""
    _prefetched_root: int = -1
    """The root whose forecast experts were prefetched."""
    _passes: deque[_Pass] = field(default_factory=lambda: deque(maxlen=RECENT))

    @classmethod
    def of(cls, target: FlashTarget | None) -> ExpertReads | None:
        """For a target with routed experts; None for a dense one."""
        if target is None or target.experts is None:
            return None
        blocks = target.pack.blocks("expert")
        start_us = blocks[0].nbytes / BYTES_PER_US
        union = ExpertUnion(
            layers=len(target.experts.layers),
            experts=len({block.expert for block in blocks}),
            top_k=chosen_experts(target.model.config),
            read_us=start_us,
        )
        return cls(target.experts, union, start_read_us=start_us)

    def verify(self, nodes: int, leaves: int) -> float:
        """Predicted microseconds of a pass without its expert reads."""
        return max(1.0, self.fixed_us + nodes * self.node_us)

    def learn(self, tree: TokenTree, verified: Verified, verify_us: float) -> None:
        """Learn from a finished pass. Mutates."""
        reads = self.count()
        computed = len(verified.row_of)
        self._passes.append(_Pass(computed, reads, verify_us))
        self._fit()
        # Routing is only known node by node where nothing was pruned.
        size = len(tree)
        whole = all(len(ids) == size for ids in self.cache.chosen.values())
        if computed == size and whole:
            layers = sorted(self.cache.chosen)
            chosen = np.stack([self.cache.chosen[layer] for layer in layers])
            self._judge(tree, chosen)
            self.union.observe(tree.drafted, chosen, reads)
        self.union.set_resident(self.cache.resident())

    def begin(self) -> None:
        """A new run: nodes have new keys, and the prompt's reads are no pass's. Mutates."""
        self.count()
        self.union.forget_forecasts(())
        self._routing = {}
        self._prefetched_root = -1

    def note(
        self,
        routing: Mapping[int, NDArray[np.int64]],
        root: int,
        prefetch: bool,
    ) -> None:
        """Take over forecasts.

        Args:
            routing: node -> expert ids [L, K].
            root: of the next tree.
            prefetch: read the root's forecast experts at once.

        Mutates: the union, and the cache's reads.
        """
        self.union.forget_forecasts(routing)
        for node in routing.keys() - self._routing.keys():
            self.union.forecast(node, routing[node], self.forecast_share)
        self._routing = dict(routing)
        if prefetch and root in routing and root != self._prefetched_root:
            self._prefetched_root = root
            self.cache.prefetch(routing[root])

    def _judge(self, tree: TokenTree, chosen: NDArray[np.int64]) -> None:
        """Learn how often forecasts are right.

        Args:
            tree: of a pass.
            chosen: the experts that its nodes chose, [L, N, K].
        """
        for node, key in enumerate(tree.keys):
            forecast = self._routing.get(key)
            if forecast is None:
                continue
            matches = chosen[:, node, :, None] == forecast[:, None, :]
            right = float(matches.any(axis=2).mean())
            self.forecast_share += FORECAST_STEP * (right - self.forecast_share)

    def count(self) -> int:
        """Experts read since the last call. Mutates."""
        before = self.seen_reads
        self.seen_reads = self.cache.counters.reads
        return self.seen_reads - before

    def _fit(self) -> None:
        """Least squares over recent passes, held near the start where those say little.

        Trees of one size do not tell nodes from reads. Held near the present values instead, what a
        node costs drifts upwards until no tree is built any more, and nothing is learned from then
        on.
        """
        nodes, reads, us = np.asarray(self._passes).T
        # Two imagined passes: one with nodes alone, one with reads alone, at the start's costs.
        held = np.array([[0.0, HELD_NODES, 0.0], [0.0, 0.0, HELD_READS]])
        held_us = held @ [0.0, NODE_US, self.start_read_us]
        ages = np.arange(len(us) - 1, -1, -1)
        weights = np.concatenate([FADING**ages, [2.0, 0.2]])
        scale = np.sqrt(weights)
        passes = np.column_stack([np.ones_like(nodes), nodes, reads])
        matrix = np.vstack([passes, held]) * scale[:, None]
        values = np.concatenate([us, held_us]) * scale
        solution = np.linalg.lstsq(matrix, values, rcond=None)[0]
        fixed_us, node_us, read_us = np.maximum(solution, 0.0)
        self.fixed_us = float(fixed_us)
        self.node_us = float(node_us)
        self.union.read_us = float(read_us)
