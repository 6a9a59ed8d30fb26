"""What a layer call of a few rows costs the host, beside those of one token.

The routing has been read already, and no graph is launched: it is the engine's call from the plan
to the sum. Half of the experts are cached; what is missing is loaded or computed on the CPU, as the
plan wants. Rows choose as the layer's liking and chance want.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval.host_path.subject import DEVICE, Subject
from hybrimoe_plugin.engine.view import HostRouting, HostView
from hybrimoe_plugin.policy.step import Scored

ROWS = (4, 16)
SETTLING = 8
"""Steps of all layers before the first that counts."""
LAYER_US = 100.0
"""What the device takes for a layer, as far as policies can see."""


class Arrived:
    """A call's routing, which the host has read."""

    finds_slots = False

    def __init__(self, view: HostView) -> None:
        self._view = view

    def seen(self) -> HostView:
        return self._view


def times(subject: Subject, rows: int, steps: int) -> list[float]:
    """Times in us of single layer calls."""
    engine = subject.engine
    spec = engine.layers[0].spec
    random = np.random.default_rng(0)
    liked = random.normal(size=(len(engine.layers), spec.experts))
    states = torch.empty(rows, spec.hidden, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.empty(rows, spec.top_k, dtype=torch.int64, device=DEVICE)
    shares = torch.empty(rows, spec.top_k, device=DEVICE)
    found: list[float] = []

    def step(views: list[HostView]) -> None:
        for layer, view in enumerate(views):
            sent: Any = Arrived(view)
            started = perf_counter_ns()
            engine.run(layer, states, ids, shares, sent)
            found.append((perf_counter_ns() - started) / 1e3)
            subject.clock.pass_by(LAYER_US)

    with torch.no_grad():
        for _ in range(SETTLING + steps):
            logits = liked[:, None] + random.gumbel(size=(len(liked), rows, spec.experts))
            views = [_view(layer, spec.top_k, spec.hidden) for layer in logits]
            subject.model.hybrimoe.turns.run(step, views)
    return found[SETTLING * len(liked) :]


def _view(logits: NDArray[np.float64], top_k: int, hidden: int) -> HostView:
    """What the host has read of a call with these logits [T, E]."""
    scores = torch.from_numpy(logits).float().softmax(1)
    weights, ids = scores.topk(top_k)
    states = torch.zeros(len(logits), hidden, dtype=torch.bfloat16)
    scored = Scored(ids.numpy(), weights.numpy(), scores.numpy())
    return HostView(HostRouting(states, ids, weights, scored), None, None)
