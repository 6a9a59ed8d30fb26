"""What a cycle costs: drafting, the verification pass, and the experts that it must read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lever_ext.tree.expert_union import NoUnion, Union

REMEMBERED = 0.97
"""Weight of a cycle in the rate against the next one's."""
FIRST_TREE = 16
"""Most nodes of the first trees, before any pass was measured."""
EXTRA_NODE = 0.25
"""Cost of a further node in a draft call, as a share of what the nodes so far cost each."""


@dataclass
class CycleCost:
    """Predicted microseconds of a cycle.

    Args:
        verify: (nodes, leaves) -> microseconds of the target pass, measured after overlap. A
            `LatencyTable` also answers for many sizes at once.
        union: expected expert reads.
        fixed_us: what every cycle costs besides.
        draft_step: weight of a new measurement of a draft call.
    """

    verify: Callable[[int, int], float]
    union: Union = field(default_factory=NoUnion)
    fixed_us: float = 0.0
    draft_step: float = 0.15
    draft_times: dict[int, float] = field(default_factory=dict)
    """Nodes in a draft call -> moving average of its microseconds."""
    rate: float = 0.0
    """Tokens per microsecond over recent cycles; 0 until there are some."""
    _tokens: float = 0.0
    _us: float = 0.0

    def worth(self, gain: Any, us: Any) -> Any:
        """What a cycle of `gain` expected tokens that takes `us` is worth: numbers or arrays.

        Tokens per microsecond of that cycle, as in the paper, until cycles have been seen. From
        then on its tokens less those that an average cycle makes in the same time. The sum over all
        cycles is what counts, so a cycle of poor prospects should be short rather than the best of
        its kind (renewal reward; in no paper on speculation).
        """
        if self.rate:
            return gain - self.rate * us
        return gain / us

    def observe_cycle(self, tokens: int, us: float) -> None:
        """Add a finished cycle. Mutates."""
        self._tokens = REMEMBERED * self._tokens + tokens
        self._us = REMEMBERED * self._us + us
        self.rate = self._tokens / self._us

    def verify_prefixes(self, leaves: NDArray[np.int64]) -> NDArray[np.float64]:
        """Predicted microseconds of passes over 1, 2, ... nodes: float64 [N].

        Args:
            leaves: of each of these trees.
        """
        at_once = getattr(self.verify, "prefixes", None)
        if at_once is not None:
            found: NDArray[np.float64] = at_once(leaves)
            return found
        sizes = enumerate(leaves.tolist(), start=1)
        return np.array([self.verify(nodes, count) for nodes, count in sizes])

    def largest_tree(self, max_nodes: int) -> int:
        """Nodes that a tree may have: at most twice as many as any measured tree.

        Growth in steps makes sure that small trees are measured too.
        """
        measured = getattr(self.verify, "most_nodes", None)
        if measured is None:
            return max_nodes
        return min(max_nodes, max(FIRST_TREE, 2 * measured))

    def observe_draft(self, nodes: int, us: float) -> None:
        """Add the measured time of one draft call over `nodes` nodes. Mutates."""
        old = self.draft_times.get(nodes, us)
        self.draft_times[nodes] = old + self.draft_step * (us - old)

    def draft_us(self, nodes: int) -> float:
        """Predicted time of one draft call, from the nearest measured size."""
        if not self.draft_times:
            return 0.0
        if nodes in self.draft_times:
            return self.draft_times[nodes]
        near = min(self.draft_times, key=lambda known: (abs(known - nodes), -known))
        extra = max(0, nodes - near) / near
        return self.draft_times[near] * (1 + EXTRA_NODE * extra)
