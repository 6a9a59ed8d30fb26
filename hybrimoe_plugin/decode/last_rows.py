"""The last layer of a prompt: only tokens whose logits are asked for need its MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.decode.hooks import Hooks
from hybrimoe_plugin.injection.own_attributes import give_own
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.routers import GateRouter


class LastRows:
    """The last decoder layer's call for many tokens, of which a language model is asked for a few
    last logits.

    Attention sees all of them, for the cache; experts and the rest of the MLP are computed for the
    wanted ones. Where an accelerator caches experts, or a recording is made, the whole prompt's
    routing counts, and nothing is left out.

    Args:
        model: the causal language model.
        layer: its last layer: x + attention(norm(x)), and then x + mlp(norm(x)).
    """

    def __init__(self, model: nn.Module, layer: Any) -> None:
        self._layer = layer
        self._keep = 0
        self._experts = [
            module for module in layer.modules() if isinstance(module, HybriMoEExperts)
        ]
        routers = [experts.routers()[0] for experts in self._experts]
        gates = [router.gate for router in routers if isinstance(router, GateRouter)]
        self._hooks = Hooks(layer.modules(), gates)
        self.remove = give_own(model, {"forward": self._watched(model.forward)})
        """Leaves the model alone."""

    def serve(self, hidden: torch.Tensor) -> bool:
        """Whether a call [B, T, H] has rows that nobody looks at."""
        wanted = 0 < self._keep < hidden.shape[1]
        return (
            wanted
            and all(experts.unplanned for experts in self._experts)
            and not self._hooks.foreign()
        )

    def __call__(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The last rows [B, keep, H] of what the layer gives."""
        layer = self._layer
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), **kwargs)
        total = hidden[:, -self._keep :] + attended[:, -self._keep :]
        output: torch.Tensor = total + layer.mlp(layer.post_attention_layernorm(total))
        return output

    def forget(self) -> None:
        """Serve nothing until a call of the model asks for it."""
        self._keep = 0

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def forward(*args: Any, **kwargs: Any) -> Any:
            keep = kwargs.get("logits_to_keep", 0)
            self._keep = keep if isinstance(keep, int) else 0
            try:
                return call(*args, **kwargs)
            finally:
                self.forget()

        return forward
