"""A decoder layer whose one-token calls are ggml graphs on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.decode.cpu_step import CpuStep
from hybrimoe_plugin.decode.foreign_hooks import ForeignHooks
from hybrimoe_plugin.decode.layer_call import EagerLayer, is_decode_step


class CpuLayer:
    """One token by `CpuStep`, any other call eagerly."""

    captured = False

    def __init__(self, eager: EagerLayer, step: CpuStep) -> None:
        self.step = step
        self._eager = eager
        self._hooks = ForeignHooks(_skipped(eager.module, step.called))

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not args and self._takes_step(hidden_states, kwargs):
            return self.step(hidden_states, kwargs["position_embeddings"], cache_in(kwargs))
        return self._eager(hidden_states, *args, **kwargs)

    def _takes_step(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        if hidden_states.dtype != torch.float32 or not is_decode_step(hidden_states, kwargs):
            return False
        return not self._hooks.present()


def _skipped(layer: nn.Module, called: tuple[str, ...]) -> list[nn.Module]:
    """The modules inside a layer that a step computes without calling them.

    Args:
        called: how the names of the others begin.
    """
    skipped = []
    for name, module in layer.named_modules():
        if name and not f"{name}.".startswith(called):
            skipped.append(module)
    return skipped
