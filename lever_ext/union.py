"""Expert reads of an MoE target: what each pass selected, and what the next tree's experts will
cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lever_ext.flash.experts import FlashExpertCache
from lever_ext.target import FlashTarget
from lever_ext.tree.cost import RECENT, ExpertUnion
from lever_ext.tree.token_tree import TokenTree
from lever_ext.verify import Verified

ROW_US = 1000.0
"""Of compute for a further row, until passes are measured."""


@dataclass
class ExpertReads:
    """Keeps a tree's expert-union cost in step with the target's cache and routing.

    The time of a pass is fitted to recent ones as fixed + rows * per row + reads * per read. A
    table over shapes, as for dense targets, would mix the cost of rows with that of the experts
    they happened to need.
    """

    cache: FlashExpertCache
    union: ExpertUnion
    seen_reads: int = 0
    fixed_us: float = 0.0
    row_us: float = ROW_US
    start_read_us: float = 0.0
    """Of an expert, until passes are measured."""
    forecast_share: float = 0.8
    """Moving average of the share of chosen experts that were forecast."""
    _routing: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    _early_root: int = -1
    _passes: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """(rows, experts read, microseconds)."""

    @classmethod
    def of(cls, target: FlashTarget | None) -> ExpertReads | None:
        """For a target with routed experts; None for a dense one."""
        if target is None or target.experts is None:
            return None
        blocks = target.pack.blocks("expert")
        experts = len({block.expert for block in blocks})
        # Until passes are measured: an expert's bytes at two gigabytes per second.
        start_us = blocks[0].nbytes / 2e3
        union = ExpertUnion(
            len(target.experts.layers), experts, target.model.config.num_experts_per_tok, start_us
        )
        return cls(target.experts, union, start_read_us=start_us)

    def verify(self, rows: int, leaves: int) -> float:
        """Predicted microseconds of a pass without its expert reads."""
        return max(1.0, self.fixed_us + rows * self.row_us)

    def learn(self, tree: TokenTree, verified: Verified, verify_us: float) -> None:
        """Learn from a finished pass. Mutates."""
        reads = self.count()
        self._passes.append((len(verified.row_of), reads, verify_us))
        self._fit()
        if len(verified.row_of) == len(tree) and all(
            len(ids) == len(tree) for ids in self.cache.chosen.values()
        ):
            chosen = np.stack([self.cache.chosen[layer] for layer in sorted(self.cache.chosen)])
            self._judge(tree, chosen)
            self.union.observe(tree.drafted, chosen, reads)
        self.union.set_resident(self.cache.resident())

    def begin(self) -> None:
        """A new run: nodes have new names, and the prompt's reads are no pass's. Mutates."""
        self.count()
        self.union.forget_forecasts(())
        self._routing, self._early_root = {}, -1

    def note(self, routing: Mapping[int, NDArray[np.int64]], root: int, early: bool) -> None:
        """Take over forecasts of node -> expert ids [L, K].

        Args:
            root: of the next tree; its forecast experts are read at once if `early`.

        Mutates: the union, and the cache's reads.
        """
        self.union.forget_forecasts(routing)
        for node in routing.keys() - self._routing.keys():
            self.union.forecast(node, routing[node], self.forecast_share)
        self._routing = dict(routing)
        if early and root in routing and root != self._early_root:
            self._early_root = root
            self.cache.read_early(routing[root])

    def _judge(self, tree: TokenTree, chosen: NDArray[np.int64]) -> None:
        """Learn how often forecasts are right from the experts [L, N, K] that a tree's
        rows chose.
        """
        for row, key in enumerate(tree.keys):
            if key in self._routing:
                right = (
                    (chosen[:, row, :, None] == self._routing[key][:, None, :]).any(axis=2).mean()
                )
                self.forecast_share += 0.05 * (float(right) - self.forecast_share)

    def count(self) -> int:
        """Experts read since the last call. Mutates."""
        reads = self.cache.counters.reads - self.seen_reads
        self.seen_reads = self.cache.counters.reads
        return reads

    def _fit(self) -> None:
        """Least squares over recent passes, held near the start where those say little.

        Trees of one size do not tell rows from reads. Held near the present values instead, what a
        row costs drifts upwards until no tree is built any more, and nothing is learned from then
        on.
        """
        rows, reads, us = np.asarray(self._passes).T
        weights = 0.95 ** np.arange(len(us) - 1, -1, -1)
        held = np.array([[0.0, 32.0, 0.0], [0.0, 0.0, 30.0]])
        scale = np.sqrt(np.concatenate([weights, [2.0, 0.2]]))
        matrix = (
            np.vstack([np.column_stack([np.ones_like(rows), rows, reads]), held]) * scale[:, None]
        )
        wanted = np.concatenate([us, held @ [0.0, ROW_US, self.start_read_us]]) * scale
        found = np.maximum(np.linalg.lstsq(matrix, wanted, rcond=None)[0], 0.0)
        self.fixed_us, self.row_us, self.union.read_us = (float(value) for value in found)
