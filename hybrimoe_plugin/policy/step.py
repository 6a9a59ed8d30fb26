"""The plain values of the decision loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.core import LayerPlan, Routed


class Move(NamedTuple):
    """One expert's weights to be sent into one slot."""

    layer: int
    expert: int
    slot: int
    start_us: float
    """When the link takes it up, as predicted."""
    end_us: float


class Step(NamedTuple):
    """What one layer call is to do."""

    layer: int
    tokens: int
    routed: tuple[Routed, ...]
    plan: LayerPlan
    moves: tuple[Move, ...]
    """The demand loads, in link order."""
    few: bool = False
    """Whether the call has a few rows, of several conversations or of a draft's tree."""
    crowded: bool = False
    """Whether the call counts as needing most of its layer's experts: a prompt always does, a call
    of a few rows if it needs more than half of them.
    """

    @property
    def many(self) -> bool:
        """Whether the call is a prompt's."""
        return self.tokens > 1 and not self.few


class Computed(NamedTuple):
    """A layer call that has been computed, for whoever watches."""

    step: Step
    """With an empty `routed` where nothing was planned."""
    ahead: Sequence[Move]
    """What was sent for later layers meanwhile."""
    start_us: float
    """On the engine's clock."""
    spent_us: float


class Lenders(NamedTuple):
    """Layers that may lose a slot to a newcomer, if layers share slots."""

    layers: Sequence[int]
    even: bool = False
    """Whether the layer that holds most loses an expert where several are worth about the same."""


Predicted = Sequence[tuple[int, Mapping[int, int]]]
"""(layer, expert -> predicted load) of the next layers, nearest first."""


FEW_ROWS = 32
"""Most rows of a call that counts as one step of several conversations, or of a draft's tree; calls
of more rows are prompts.
"""


class Rows(NamedTuple):
    """Which conversation each row of a call continues, and which rows may yet be rejected."""

    owners: NDArray[np.int64]
    """[T] a number for the conversation that each row continues: equal numbers, same one."""
    sure: NDArray[np.bool_]
    """[T] False for a draft's tokens, which may be rejected once the pass is done."""


class Scored(NamedTuple):
    """What a cache learns from: the routing decision of one layer call."""

    ids: NDArray[np.int64]
    """[T, K]"""
    weights: NDArray[np.float32]
    """[T, K]"""
    scores: NDArray[np.float32] | None
    """[T, E]; None where the host does not show them."""
    rows: Rows | None = None
    """None for a single token and for a prompt."""

    @property
    def few(self) -> bool:
        """Whether the call has a few rows, of several conversations or of a draft's tree."""
        return self.rows is not None and 1 < len(self.ids) <= FEW_ROWS


class IdleTime(NamedTuple):
    """The time from the start of the running call to the predicted start of the next layer's."""

    now_us: float
    until_us: float


def loads(ids: NDArray[np.int64]) -> dict[int, int]:
    """Expert -> number of tokens that chose it, for ids [T, K]."""
    if len(ids) == 1:
        return dict.fromkeys(ids[0].tolist(), 1)
    counts = np.bincount(ids.ravel())
    experts = np.flatnonzero(counts)
    return dict(zip(experts.tolist(), counts[experts].tolist(), strict=True))


def whole_call(layer: int, ids: NDArray[np.int64], start_us: float, spent_us: float) -> Computed:
    """A call that the CPU has computed unplanned.

    Args:
        ids: [T, K]
    """
    experts = tuple(loads(ids))
    plan = LayerPlan(experts, (), (), spent_us, spent_us, 0.0, 0.0)
    step = Step(layer, len(ids), (), plan, (), few=1 < len(ids) <= FEW_ROWS)
    return Computed(step, (), start_us, spent_us)
