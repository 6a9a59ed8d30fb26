"""Which experts drafted tokens will need, before the target has seen them.

A draft that is a low-bit copy of the target, or of the model that the target was made from, has
nearly the target's hidden states. The target's own routers, applied to them while the draft runs,
forecast each node's experts. The tree's cost then knows which nodes share experts, and the root's
experts, needed whatever happens, are read while the draft works and the device would be idle. How
often forecasts are right is measured; other drafts get none. In no paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.weights.layer_weights import chosen_experts
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.flash.pack import Tensors
from lever_ext.target import FlashTarget


class RoutingForecast:
    """The target's routers over a draft's hidden states.

    Args:
        gates: router weights of the MoE layers, [L, E, H].
        layers: their places among the decoder layers.
        top_k: experts of a token.
    """

    def __init__(self, gates: torch.Tensor, layers: Sequence[int], top_k: int) -> None:
        self.layers = tuple(layers)
        self._gates = gates.float().transpose(1, 2)
        self._top_k = top_k

    @classmethod
    def of(cls, target: FlashTarget, draft: Any) -> RoutingForecast | None:
        """The forecast of a target's routing from a draft.

        Returns:
            None for drafts whose layers do not have the target's shapes, and where routers are not
            in DRAM, or choose by more than the largest logits.
        """
        if target.experts is None:
            return None
        if not isinstance(draft, LanguageModelDraft) or not draft.can_probe:
            return None
        layers = target.experts.layers
        config = target.model.config
        same = all(
            getattr(config, name) == getattr(draft.model.config, name)
            for name in ("hidden_size", "num_hidden_layers")
        )
        if not same or target.residency.layers <= max(layers):
            return None
        found = [_gate(target.stream.resident[layer]) for layer in layers]
        gates = [gate for gate in found if gate is not None]
        if len(gates) != len(layers):
            return None
        return cls(torch.stack(gates), layers, chosen_experts(config))

    def __call__(self, inner: Sequence[torch.Tensor]) -> NDArray[np.int64]:
        """Forecast experts of N nodes.

        Args:
            inner: the FFN inputs [N, H] of each MoE layer.

        Returns:
            ids [N, L, K].
        """
        with torch.inference_mode():
            stacked = torch.stack(list(inner)).float()
            logits = torch.bmm(stacked, self._gates)
            ids = logits.topk(self._top_k).indices
            found: NDArray[np.int64] = ids.transpose(0, 1).numpy()
        return found


def _gate(tensors: Tensors) -> torch.Tensor | None:
    """The router's weight [E, H] among a decoder layer's; None where a router is more than that."""
    parts = [name for name in tensors if ".mlp.gate." in name or ".mlp.router." in name]
    if len(parts) != 1 or not parts[0].endswith(".mlp.gate.weight"):
        return None
    return tensors[parts[0]]
