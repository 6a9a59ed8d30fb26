"""A decoder layer whose calls of a few tokens are ggml graphs on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.compute.attention.kv_cache import cache_in
from hybrimoe_plugin.decode.foreign_hooks import ForeignHooks
from hybrimoe_plugin.decode.layer_call import EagerLayer, is_decode_step
from hybrimoe_plugin.decode.on_cpu.cpu_step import CpuStep
from hybrimoe_plugin.policy.step import FEW_ROWS


class CpuLayer:
    """Up to `FEW_ROWS` tokens by `CpuStep`, any other call eagerly."""

    captured = False

    def __init__(self, eager: EagerLayer, step: CpuStep) -> None:
        self.step = step
        self._eager = eager
        self._hooks = ForeignHooks(_skipped(eager.module, step.called))

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not args and self._takes_step(hidden_states, kwargs):
            return self.step(hidden_states, kwargs["position_embeddings"], cache_in(kwargs))
        if self.step.link is not None:
            self.step.link.hand_over()
        if not args and self._takes_rows(hidden_states, kwargs):
            mask = kwargs.get("attention_mask")
            embeddings = kwargs["position_embeddings"]
            return self.step.rows(hidden_states, embeddings, mask, cache_in(kwargs))
        return self._eager(hidden_states, *args, **kwargs)

    def _takes_step(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        if hidden_states.dtype != torch.float32 or not is_decode_step(hidden_states, kwargs):
            return False
        return not self._hooks.present()

    def _takes_rows(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        if hidden_states.dtype != torch.float32 or torch.is_grad_enabled():
            return False
        if not 1 < hidden_states.shape[0] * hidden_states.shape[1] <= FEW_ROWS:
            return False
        return kwargs.get("position_embeddings") is not None and not self._hooks.present()


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
