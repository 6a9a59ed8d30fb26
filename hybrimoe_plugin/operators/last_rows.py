"""The last layer of a prompt: only tokens whose logits are asked for need its MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.hooks import Hooks
from hybrimoe_plugin.operators.routers import GateRouter


class LastRows:
    """The last decoder layer's call for many tokens, of which a language model is asked for a few last logits.

    Attention sees all of them, for the cache; experts and the rest of the MLP are computed for the wanted ones. Where
    an accelerator caches experts, or a recording is made, the whole prompt's routing counts, and nothing is left out.

    Args:
        model: the causal language model.
        layer: its last layer: x + attention(norm(x)), and then x + mlp(norm(x)).
    """

    def __init__(self, model: nn.Module, layer: Any) -> None:
        self._layer = layer
        self._keep = 0
        self._experts = [module for module in layer.modules() if isinstance(module, HybriMoEExperts)]
        routers = [experts.routers()[0] for experts in self._experts]
        gates = [router.gate for router in routers if isinstance(router, GateRouter)]
        self._hooks = Hooks(layer.modules(), gates)
        self._handles = (
            model.register_forward_pre_hook(self._asked, with_kwargs=True),
            model.register_forward_hook(self._answered, always_call=True),
        )

    def serve(self, hidden: torch.Tensor) -> bool:
        """Whether a call [B, T, H] has rows that nobody looks at."""
        wanted = 0 < self._keep < hidden.shape[1]
        return wanted and all(experts.unplanned for experts in self._experts) and not self._hooks.foreign()

    def __call__(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The last rows [B, keep, H] of what the layer gives."""
        layer = self._layer
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), **kwargs)
        total = hidden[:, -self._keep :] + attended[:, -self._keep :]
        output: torch.Tensor = total + layer.mlp(layer.post_attention_layernorm(total))
        return output

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _asked(self, _model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        keep = kwargs.get("logits_to_keep", 0)
        self._keep = keep if isinstance(keep, int) else 0

    def _answered(self, *_: Any) -> None:
        self._keep = 0
