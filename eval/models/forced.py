"""Routing taken from a recorded trace instead of the model's router, to measure speed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.errors import ConfigError


def route_by(model: Any, trace: Path) -> None:
    """Replace every router's choice in an injected model by a trace's, token by token.

    The trace is repeated as often as needed. The routers still compute; only what they chose is
    exchanged, by a hook on each.

    Raises:
        ConfigError: the trace is of another number of experts, or of too few layers or experts per
            token.
        TraceError: not a sound trace.

    Mutates: `model`.
    """
    from hybrimoe_plugin.hosts.transformers.preparation.places import experts_operators
    from hybrimoe_plugin.replay.trace import read_trace

    read = read_trace(trace)
    operators = experts_operators(model)
    loaded = operators[0].weights
    assert loaded is not None, "the model is loaded"
    spec = loaded.spec
    layers = len(operators)
    header = read.header
    enough = header.layers >= layers and header.top_k >= spec.top_k
    if header.experts > spec.experts or not enough:
        given = f"{header.top_k} of {header.experts} experts in {header.layers} layers"
        needed = f"{spec.top_k} of {spec.experts} in {layers}"
        raise ConfigError(f"{trace} routes {given}; the model needs {needed}")
    for position, operator in enumerate(operators):
        calls = [call for call in read.calls if call.layer == position]
        ids = np.concatenate([call.ids for call in calls])
        weights = np.concatenate([call.weights for call in calls])
        block, _, _ = operator.key.rpartition(".")
        gate = model.get_submodule(block).gate
        gate.register_forward_hook(_Chosen(ids[:, : spec.top_k], weights[:, : spec.top_k]))


class _Chosen:
    """A forward hook that answers with the next rows of one layer's trace.

    Args:
        ids: [tokens, K].
        weights: [tokens, K].
    """

    def __init__(self, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
        self._ids = torch.from_numpy(ids).long()
        self._weights = torch.from_numpy(weights).float()
        self._at = 0

    def __call__(
        self, _module: Any, _args: Any, output: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        logits, weights, *_ = output
        end = self._at + len(weights)
        rows = torch.arange(self._at, end) % len(self._ids)
        self._at = end
        return logits, self._weights[rows].to(weights.dtype), self._ids[rows]
