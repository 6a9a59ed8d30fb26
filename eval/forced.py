"""Routing taken from a recorded trace instead of the model's router, for measuring speed under real
routing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.errors import ConfigError


def route_by(model: Any, trace: Path) -> None:
    """Replace the choice of every router of an injected model by the trace's, token by token, over
    and over.

    The routers still compute; only what they chose is exchanged, by a hook on each.

    Raises:
        ConfigError: the trace is of another number of experts, or of too few layers or experts per
            token.
        TraceError: not a sound trace.

    Mutates: `model`.
    """
    from hybrimoe_plugin.hosts.transformers.load import experts_operators
    from hybrimoe_plugin.replay.trace import read_trace

    read = read_trace(trace)
    operators = experts_operators(model)
    spec = operators[0].weights.spec if operators[0].weights is not None else None
    assert spec is not None, "the model is loaded"
    header = read.header
    if header.experts > spec.experts or header.layers < len(operators) or header.top_k < spec.top_k:
        raise ConfigError(
            f"{trace} routes {header.top_k} of {header.experts} experts in {header.layers} "
            f"layers; the model needs "
            f"{spec.top_k} of {spec.experts} in {len(operators)}"
        )
    for position, operator in enumerate(operators):
        rows = [call for call in read.calls if call.layer == position]
        ids = np.concatenate([call.ids for call in rows])[:, : spec.top_k]
        weights = np.concatenate([call.weights for call in rows])[:, : spec.top_k]
        gate = model.get_submodule(operator.key.rpartition(".")[0]).gate
        gate.register_forward_hook(_Chosen(ids, weights))


class _Chosen:
    """A forward hook that answers with the next rows of one layer's trace."""

    def __init__(self, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
        self._ids, self._weights = torch.from_numpy(ids).long(), torch.from_numpy(weights).float()
        self._at = 0

    def __call__(
        self, _module: Any, _args: Any, output: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        logits, weights = output[0], output[1]
        rows = torch.arange(self._at, self._at + len(weights)) % len(self._ids)
        self._at += len(weights)
        return logits, self._weights[rows].to(weights.dtype), self._ids[rows]
