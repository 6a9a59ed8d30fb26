"""A decoder layer whose one-token calls are ggml graphs on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.decode.cpu_step import CpuStep
from hybrimoe_plugin.decode.foreign_hooks import ForeignHooks
from hybrimoe_plugin.decode.last_tokens import LastTokens
from hybrimoe_plugin.decode.layer_call import EagerLayer, is_decode_step

CALLED_AS_MODULES = ("mlp.gate.", "mlp.experts.")
"""What a `CpuStep` calls with all its hooks."""


class CpuLayer:
    """One token by `CpuStep`, a prompt's last layer by `LastTokens`, any other call eagerly.

    Attributes:
        last_tokens: given to the last layer of a model, after it is made.
    """

    captured = False

    def __init__(self, eager: EagerLayer, step: CpuStep) -> None:
        self.step = step
        self.last_tokens: LastTokens | None = None
        self._eager = eager
        self._hooks = ForeignHooks(_skipped(eager.module))

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not args:
            if self._takes_step(hidden_states, kwargs):
                return self.step(hidden_states, kwargs["position_embeddings"], cache_in(kwargs))
            if self.last_tokens is not None and self.last_tokens.applies(hidden_states):
                return self.last_tokens(hidden_states, **kwargs)
        return self._eager(hidden_states, *args, **kwargs)

    def _takes_step(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        if hidden_states.dtype != torch.float32 or not is_decode_step(hidden_states, kwargs):
            return False
        return not self._hooks.present()


def _skipped(layer: nn.Module) -> list[nn.Module]:
    """The modules inside a layer that a step computes without calling them."""
    skipped = []
    for name, module in layer.named_modules():
        if name and not f"{name}.".startswith(CALLED_AS_MODULES):
            skipped.append(module)
    return skipped
