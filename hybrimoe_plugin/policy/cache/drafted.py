"""The calls of a pass that verifies a draft's tree, kept until its accepted rows are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.policy.cache.ranked import Ranks
from hybrimoe_plugin.policy.step import Rows, Scored


class Drafted(NamedTuple):
    """One layer call, and what was known of the layer before it."""

    layer: int
    scored: Scored
    """Of what was chosen; whose rows these are is kept in `rows`."""
    rows: Rows
    features: Ranks
    """[F, E]"""
    last: Ranks
    """[E]"""
    seen: float


Evidence = tuple[Ranks, Ranks, Ranks]
"""Weights [F], moments [F, F] and targets [F]."""


class DraftedPass:
    """Collects copies: engines use the memory of a call again, caches change theirs in place."""

    def __init__(self) -> None:
        self.before: Evidence | None = None
        """Before the pass; None where there is none."""
        self._calls: list[Drafted] = []

    def add(self, call: Drafted, before: Evidence) -> None:
        """A call is about to be learned from. Mutates.

        One of the same layer as the call before it, or of an earlier one, begins a new pass.

        Args:
            call: of a layer as it is now.
            before: what is known now.
        """
        if not self._calls or call.layer <= self._calls[-1].layer:
            self.clear()
            weights, moments, targets = before
            self.before = weights.copy(), moments.copy(), targets.copy()
        ids, chosen_weights, scores, _ = call.scored
        shown = None if scores is None else scores.copy()
        self._calls.append(
            call._replace(
                scored=Scored(ids.copy(), chosen_weights.copy(), shown),
                features=call.features.copy(),
                last=call.last.copy(),
            )
        )

    def corrected(self, accepted: NDArray[np.bool_]) -> tuple[Evidence | None, list[Drafted]]:
        """What was known before the pass, and its calls with the accepted rows sure.

        Args:
            accepted: [T]

        Raises:
            InputError: the pass had another number of rows.
        """
        calls = self._calls
        if not calls:
            return None, []
        rows = calls[0].rows
        if accepted.shape != rows.sure.shape:
            raise InputError(
                f"verified: expected one truth value for each of the pass's {len(rows.sure)} rows, "
                f"found the shape {list(accepted.shape)}"
            )
        known = Rows(rows.owners, rows.sure | accepted)
        return self.before, [call._replace(rows=known) for call in calls]

    def clear(self) -> None:
        """Keep nothing. Mutates."""
        self._calls = []
        self.before = None
