"""Modelled predictions of later layers, for traces that have none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hybrimoe_plugin.policy.cache.ranked import Ids
from hybrimoe_plugin.replay.sources.popularity import Popularity, counts
from hybrimoe_plugin.replay.trace import Call, Trace


def with_predictions(trace: Trace, recall: float, depth: int = 3, seed: int = 0) -> Trace:
    """Model predictions of a stated recall at distance 1; at distance d it is `recall ** d`.

    Each true expert stays with that probability; the others are drawn from the layer's popularity,
    without repeats. The header says that they are modelled.

    Args:
        recall: share of the chosen experts that is predicted, 0 to 1.
        depth: later layers that are predicted.
        seed: which of the errors are drawn.
    """
    rng = np.random.default_rng(seed)
    popularity = np.log(counts(trace.calls, trace.header))
    calls: list[Call] = []
    for group in trace.passes():
        by_layer = {call.layer: call for call in group}
        for call in group:
            predicted = []
            for distance in range(1, depth + 1):
                target = by_layer.get(call.layer + distance)
                # The last layer of a prompt can have fewer tokens: those cannot be predicted.
                if target is None or len(target.ids) != len(call.ids):
                    break
                liking = popularity[target.layer]
                guess = _blur(target.ids, liking, recall**distance, rng)
                predicted.append(guess)
            calls.append(call._replace(predicted=tuple(predicted)))
    label = f"modelled at recall {recall}"
    return Trace(replace(trace.header, predictions=label), calls)


def _blur(ids: Ids, liking: Popularity, recall: float, rng: np.random.Generator) -> Ids:
    """Keep each id with probability `recall`, replace the others, by popular experts more often.

    Drawing without repeats is taking the highest of log popularity plus Gumbel noise.

    Args:
        ids: [T, K] what the layer will choose.
        liking: [E] log popularity.

    Returns:
        [T, K] what is predicted.
    """
    tokens, top_k = ids.shape
    noise = rng.gumbel(size=(tokens, len(liking)))
    keys = liking + noise
    np.put_along_axis(keys, ids, -np.inf, axis=1)
    order = np.argsort(-keys, axis=1)
    others = order[:, :top_k]
    lost = rng.random(ids.shape) >= recall
    # Where nearly all experts are chosen there may be too few others: then the true ones stay.
    lost &= np.take_along_axis(keys, others, axis=1) > -np.inf
    return np.where(lost, others, ids)
