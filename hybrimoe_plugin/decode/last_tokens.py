"""The last layer of a prompt: only tokens whose logits are asked for need its MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.decode.foreign_hooks import ForeignHooks
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.decode.layer_call import LayerCall
from hybrimoe_plugin.decode.proof.last_rows import (
    LastRows,
    head_takes_last_tokens,
    parts_behind_attention,
)
from hybrimoe_plugin.device.torch_threads import one_thread
from hybrimoe_plugin.injection.own_attributes import give_own
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.proof.stage import place_of
from hybrimoe_plugin.operators.proof.twin import bare_copy
from hybrimoe_plugin.operators.routers import GateRouter


class LastTokens:
    """The last decoder layer's call for many tokens, of which only the last logits are asked for.

        tokens      | t0 | t1 | t2 | ... | tn |        logits_to_keep = 1
        attention   | x  | x  | x  | ... | x  |        the cache needs all of them
        MLP         |    |    |    |     | x  |

    The layer's own code runs; only what it calls behind its attention is given fewer tokens. Where
    an accelerator caches experts, or a recording is made, the whole prompt's routing counts, and
    nothing is left out.

    Args:
        model: the causal language model.
        layer: its last layer.
        parts: names of what it calls behind its attention (`parts_behind_attention`).
    """

    def __init__(self, model: nn.Module, layer: GraphedLayer, parts: tuple[str, ...]) -> None:
        self._layer = layer
        self._own = bare_copy(layer.eager.module)
        """The layer without its hooks, whose children are exchanged for each call."""
        self._parts = {
            name: LastRows(functools.partial(getattr, layer, name), lambda: self._keep)
            for name in parts
        }
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
        # The layer's children as they are now: adapters put others in their place.
        self._own._modules = {**self._layer._modules, **self._parts}
        output: torch.Tensor = self._own(hidden, **kwargs)
        return output[:, -self._keep :]

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


class LastLayer:
    """A model's last layer: `LastTokens` where they apply, else what calls the layer otherwise."""

    def __init__(self, call: LayerCall, last_tokens: LastTokens) -> None:
        self.call = call
        self._last_tokens = last_tokens

    @property
    def captured(self) -> bool:
        return self.call.captured

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not args and self._last_tokens.applies(hidden_states):
            return self._last_tokens(hidden_states, **kwargs)
        return self.call(hidden_states, *args, **kwargs)


@one_thread()
def last_tokens_of(model: Any, layer: GraphedLayer) -> LastTokens | None:
    """For a model's last layer, where it is proved that nothing else changes; else None."""
    place = place_of(model, layer.key)
    if place is None or place.number != len(getattr(place.base, place.layers)) - 1:
        return None
    path = tuple(layer.key.split(".")[: -1 - len(place.path)])
    parts = parts_behind_attention(layer.eager.module)
    if parts is None or not head_takes_last_tokens(model, path):
        return None
    return LastTokens(model, layer, parts)
