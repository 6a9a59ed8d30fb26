"""How much each row of a call of a few counts for what a cache learns."""

from __future__ import annotations

import numpy as np

from hybrimoe_plugin.policy.cache.ranked import Shares
from hybrimoe_plugin.policy.step import Rows

REJECTED = 0.5
"""What a draft's rejected token counts, of an accepted one: the next tree has such tokens too."""


def row_shares(rows: Rows) -> Shares:
    """[T] shares of a call's rows; they sum to 1.

    Every conversation has the same share, whether it has one row or a tree of many, so none starves
    another. Its sure rows have equal parts of it, the others `REJECTED` of such a part.
    """
    sure = np.where(rows.sure, 1.0, REJECTED)
    _, owner = np.unique(rows.owners, return_inverse=True)
    totals = np.bincount(owner, weights=sure)
    shares: Shares = sure / (totals[owner] * len(totals))
    return shares
