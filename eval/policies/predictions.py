"""How good predictions of the next layers' experts are."""

from __future__ import annotations

from collections import Counter
from typing import Any

from eval.policies.systems import OURS, prepare
from hybrimoe_plugin.replay.trace import Trace


def prediction_rows(name: str, routing: Trace, recall: float) -> list[dict[str, Any]]:
    """Share of what a decode call needed that was predicted, by distance.

    As many experts are predicted as are needed, so precision is the same.

    Args:
        recall: of modelled predictions; recorded ones have their own.
    """
    trace = prepare(OURS, routing, recall)
    hits: Counter[int] = Counter()
    made: Counter[int] = Counter()
    for group in trace.passes():
        if len(group[0].ids) != 1:
            continue
        needed = {call.layer: set(call.ids.ravel().tolist()) for call in group}
        for call in group:
            for distance, ids in enumerate(call.predicted, 1):
                later = call.layer + distance
                if later in needed:
                    predicted = set(ids.ravel().tolist())
                    hits[distance] += len(needed[later] & predicted)
                    made[distance] += ids.size
    rows = []
    for distance in sorted(made):
        row = {"trace": name, "predictions": trace.header.predictions, "distance": distance}
        rows.append({**row, "recall": hits[distance] / made[distance]})
    return rows
