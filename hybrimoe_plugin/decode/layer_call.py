"""How a decoder layer may be called: the protocol, and the model's own code as the plain twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn


class LayerCall(Protocol):
    """Computes what a decoder layer computes: hidden states [B, T, H] from [B, T, H]."""

    @property
    def captured(self) -> bool:
        """Whether the next decode step of the running sequence replays CUDA graphs."""
        ...

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """With the layer's own arguments. Mutates: the KV cache among them."""
        ...


class EagerLayer:
    """The model's own layer, called as it is: the twin that every graph is compared with.

    This is not a module, so an operator that holds it does not register the layer as a child.
    """

    captured = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = self.module(hidden_states, *args, **kwargs)
        return output


def is_decode_step(hidden_states: torch.Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether graphs serve a call: one token of one sequence, without padding or gradients."""
    return hidden_states.shape[:2] == (1, 1) and is_plain(kwargs)


def is_plain(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call's other arguments are of the kind that graphs serve."""
    if kwargs.get("attention_mask") is not None or torch.is_grad_enabled():
        return False
    return kwargs.get("position_embeddings") is not None
