"""Expert reads of an MoE target: what each pass selected, and what the next tree's experts will cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lever_ext.flash.experts import FlashExpertCache
from lever_ext.target import FlashTarget
from lever_ext.tree.cost import ExpertUnion
from lever_ext.tree.token_tree import TokenTree
from lever_ext.verify import Verified


@dataclass
class ExpertReads:
    """Keeps a tree's expert-union cost in step with the target's cache and routing.

    The time of a pass is split into a part that depends on its shape, which the latency table learns, and a part per
    expert read, fitted here by a line through recent (experts read, time) of passes.
    """

    cache: FlashExpertCache
    union: ExpertUnion
    seen_reads: int = 0
    _weight: float = 0.0
    _means: tuple[float, float] = (0.0, 0.0)
    _moments: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, target: FlashTarget | None) -> ExpertReads | None:
        """For a target with routed experts; None for a dense one."""
        if target is None or target.experts is None:
            return None
        experts = len({block.expert for block in target.pack.blocks("expert")})
        union = ExpertUnion(len(target.experts.layers), experts, target.model.config.num_experts_per_tok)
        made = cls(target.experts, union)
        union.read_us = made.device_us()
        return made

    def device_us(self) -> float:
        """What the device takes for one expert, by all that was read so far; at a gigabyte per second before that."""
        counters = self.cache.pack.reader.counters
        rate = counters.busy_us / counters.nbytes if counters.nbytes else 1e-3
        return self.cache.pack.blocks("expert")[0].nbytes * rate

    def learn(self, tree: TokenTree, verified: Verified, verify_us: float) -> float:
        """Learn from a finished pass; the part of its time that its expert reads do not explain. Mutates."""
        reads = self.count()
        self._fit(reads, verify_us)
        if len(verified.row_of) == len(tree) and all(len(ids) == len(tree) for ids in self.cache.chosen.values()):
            chosen = np.stack([self.cache.chosen[layer] for layer in sorted(self.cache.chosen)])
            for row, token in enumerate(tree.tokens):
                self.union.observe(token, chosen[:, row])
        self.union.set_resident(self.cache.resident())
        return self.rest(reads, verify_us)

    def count(self) -> int:
        """Experts read since the last call. Mutates."""
        reads = self.cache.counters.reads - self.seen_reads
        self.seen_reads = self.cache.counters.reads
        return reads

    def rest(self, reads: int, us: float) -> float:
        """The part of a pass's time that its expert reads do not explain."""
        return max(us - reads * self.union.read_us, 0.05 * us)

    def _fit(self, reads: int, us: float) -> None:
        """Exponentially weighted least squares of time on reads."""
        keep = 0.95
        self._weight = keep * self._weight + 1
        step = 1 / self._weight
        dx, dy = reads - self._means[0], us - self._means[1]
        self._means = (self._means[0] + step * dx, self._means[1] + step * dy)
        rest_x, rest_y = reads - self._means[0], us - self._means[1]
        self._moments = (keep * self._moments[0] + dx * rest_x, keep * self._moments[1] + dx * rest_y)
        if self._weight > 5 and self._moments[0] > 1:
            slope, device = self._moments[1] / self._moments[0], self.device_us()
            # A read can hide behind compute or bring compute with it, but not by any factor: passes are noisy.
            self.union.read_us += 0.2 * (min(max(slope, 0.4 * device), 1.5 * device) - self.union.read_us)
