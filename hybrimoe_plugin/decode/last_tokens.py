"""The last layer of a prompt: only tokens whose logits are asked for need its MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.decode.foreign_hooks import ForeignHooks
from hybrimoe_plugin.injection.own_attributes import give_own
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.routers import GateRouter


class LastTokens:
    """The last decoder layer's call for many tokens, of which only the last logits are asked for.

        tokens      | t0 | t1 | t2 | ... | tn |        logits_to_keep = 1
        attention   | x  | x  | x  | ... | x  |        the cache needs all of them
        MLP         |    |    |    |     | x  |

    Where an accelerator caches experts, or a recording is made, the whole prompt's routing counts,
    and nothing is left out.

    Args:
        model: the causal language model.
        layer: its last layer: x + attention(norm(x)), and then x + mlp(norm(x)).
    """

    def __init__(self, model: nn.Module, layer: Any) -> None:
        self._layer = layer
        self._keep = 0
        """How many last tokens the running call of the model asks logits for; 0 for all."""
        modules = list(layer.modules())
        self._experts = [module for module in modules if isinstance(module, HybriMoEExperts)]
        routers = [experts.routers()[0] for experts in self._experts]
        gates = [router.gate for router in routers if isinstance(router, GateRouter)]
        self._hooks = ForeignHooks(modules, gates)
        self.remove = give_own(model, {"forward": self._watched(model.forward)})
        """Takes off what this has put around the model's forward."""

    def applies(self, hidden: torch.Tensor) -> bool:
        """Whether a call [B, T, H] has tokens whose results nobody reads."""
        if not 0 < self._keep < hidden.shape[1]:
            return False
        if not all(experts.unplanned for experts in self._experts):
            return False
        return not self._hooks.present()

    def __call__(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The last tokens [B, keep, H] of what the layer gives. Mutates: the KV cache."""
        layer = self._layer
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), **kwargs)
        total = hidden[:, -self._keep :] + attended[:, -self._keep :]
        output: torch.Tensor = total + layer.mlp(layer.post_attention_layernorm(total))
        return output

    def forget(self) -> None:
        """Leave nothing out until a call of the model asks for it."""
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
