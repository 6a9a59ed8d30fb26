"""CPU experts in plain torch: the reference for every backend, and the oracle of their tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.activation import activate
from hybrimoe_plugin.core import SILU, Activation
from hybrimoe_plugin.weights.layer_weights import LayerWeights

Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Gate [I, H], up [I, H] and down [H, I]."""


ExpertBiases = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of gate [I], up [I] and down [H]."""


def expert_forward(
    hidden: torch.Tensor,
    expert: Expert,
    activation: Activation = SILU,
    biases: ExpertBiases | tuple[None, None, None] = (None, None, None),
) -> torch.Tensor:
    """One expert: [N, H] -> [N, H]."""
    gate, up, down = expert
    gate_bias, up_bias, down_bias = biases
    inner = activate(F.linear(hidden, gate, gate_bias), F.linear(hidden, up, up_bias), activation)
    return F.linear(inner, down, down_bias)


def add_expert(
    output: torch.Tensor,
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    forward: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Add one expert's weighted output to the tokens that chose it.

    Args:
        output: [T, H]. Mutates.
        hidden: [T, H].
        chosen: [T, K] bool, True where this expert is meant.
        weights: [T, K] routing weights, read at the same places.
        forward: the expert, [N, H] -> [N, H].
    """
    tokens, places = chosen.nonzero(as_tuple=True)
    if not len(tokens):
        return
    shares = weights[tokens, places, None].to(hidden.dtype)
    part = forward(hidden[tokens]) * shares
    output.index_add_(0, tokens, part)


def expert_biases(
    weights: LayerWeights, expert: int, dtype: torch.dtype
) -> ExpertBiases | tuple[None, None, None]:
    """What one expert adds to its products; three times None where a layer has no biases."""
    if weights.biases is None:
        return None, None, None
    gate, up = weights.biases.gate_up[expert].to(dtype).chunk(2)
    return gate, up, weights.biases.down[expert].to(dtype)


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
        weights = self._layers[layer]
        for index in mine:
            forward = functools.partial(
                expert_forward,
                expert=self._expert(layer, index, hidden.dtype),
                activation=weights.spec.activation,
                biases=expert_biases(weights, index, hidden.dtype),
            )
            add_expert(output, hidden, topk_ids == index, topk_weights, forward)
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
