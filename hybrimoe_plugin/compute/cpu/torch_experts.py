"""CPU experts in plain torch: the reference for every backend, and the oracle of their tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from hybrimoe_plugin.weights.layer_weights import LayerWeights

Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Gate [I, H], up [I, H] and down [H, I]."""


def expert_forward(hidden: torch.Tensor, expert: Expert) -> torch.Tensor:
    """SwiGLU of one expert: [N, H] -> [N, H]."""
    gate, up, down = expert
    activated = F.silu(F.linear(hidden, gate))
    inner = activated * F.linear(hidden, up)
    return F.linear(inner, down)


def add_expert(
    output: torch.Tensor,
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    expert: Expert,
) -> None:
    """Add one expert's weighted output to the tokens that chose it.

    Args:
        output: [T, H]. Mutates.
        hidden: [T, H].
        chosen: [T, K] bool, True where this expert is meant.
        weights: [T, K] routing weights, read at the same places.
    """
    tokens, places = chosen.nonzero(as_tuple=True)
    if not len(tokens):
        return
    shares = weights[tokens, places, None].to(hidden.dtype)
    part = expert_forward(hidden[tokens], expert) * shares
    output.index_add_(0, tokens, part)


class TorchExperts:
    """Dequantises an expert to hidden's dtype and computes it; synchronous.

    Args:
        keep: remember dequantised experts, which takes their full size in memory: for tests and
            tiny models.
    """

    name = "torch"
    workers = 0

    def __init__(self, keep: bool = False) -> None:
        self._layers: list[LayerWeights] = []
        self._kept: dict[tuple[int, int, torch.dtype], Expert] | None = {} if keep else None
        self._output: torch.Tensor | None = None

    def add_layer(self, weights: LayerWeights) -> None:
        self._layers.append(weights)

    def submit(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        mine: Sequence[int],
    ) -> None:
        output = torch.zeros_like(hidden)
        for index in mine:
            expert = self._expert(layer, index, hidden.dtype)
            add_expert(output, hidden, topk_ids == index, topk_weights, expert)
        self._output = output

    def sync(self) -> torch.Tensor:
        assert self._output is not None, "sync without submit"
        return self._output

    def abandon(self) -> None:
        self._output = None

    def close(self) -> None:
        self._layers.clear()
        if self._kept is not None:
            self._kept.clear()

    def _expert(self, layer: int, index: int, dtype: torch.dtype) -> Expert:
        if self._kept is None:
            return self._layers[layer].dequantized(index, dtype)
        key = (layer, index, dtype)
        if key not in self._kept:
            self._kept[key] = self._layers[layer].dequantized(index, dtype)
        return self._kept[key]
