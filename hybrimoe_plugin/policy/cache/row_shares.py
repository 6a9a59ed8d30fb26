"""How much each row of a call of a few rows counts in what a cache learns."""

from __future__ import annotations

import numpy as np

from hybrimoe_plugin.policy.cache.ranked import Shares
from hybrimoe_plugin.policy.step import Rows

REJECTED = 0.5
"""Weight of a draft's token that was rejected, or may be; an accepted one has 1.

Not 0, since the next tree has such tokens too.
"""


def row_shares(rows: Rows) -> Shares:
    """[T] the weight of each row of a call; they sum to 1.

    Every conversation has the same weight in all, whether it has one row or a tree of many, so none
    starves another. Within it, a row that is not sure has `REJECTED` times a sure one's weight.
    """
    sure = np.where(rows.sure, 1.0, REJECTED)
    _, owner = np.unique(rows.owners, return_inverse=True)
    totals = np.bincount(owner, weights=sure)
    shares: Shares = sure / (totals[owner] * len(totals))
    return shares
