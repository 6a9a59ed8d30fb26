"""Hidden states on their way between CPU and accelerator, and what goes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import cache_in

CPU = torch.device("cpu")


class Carrier:
    """Takes a layer's inputs to the side that computes it, and the last layer's result back to the
    CPU.

    Masks, positions and rotary factors are the same tensors for all layers of a pass: each goes
    over the link once.

    Args:
        device: the accelerator.
        there: for every layer, whether the accelerator computes it.
    """

    def __init__(self, device: torch.device, there: list[bool]) -> None:
        self._device = device
        self._there = there
        self._known: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def run(
        self,
        index: int,
        layer: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """What the layer returns, on its side; on the CPU after the last layer. Mutates: the
        layer's KV changes sides with it.
        """
        side = self._device if self._there[index] else CPU
        if index == 0:
            self._known.clear()
        hidden, *rest = args
        named = {name: self._brought(value, side) for name, value in kwargs.items()}
        move_kv(kwargs, index, side)
        output = layer(
            _sent(hidden, side), *(self._brought(value, side) for value in rest), **named
        )
        if index + 1 < len(self._there):
            return output
        self._known.clear()
        return (
            output.to(CPU) if isinstance(output, torch.Tensor) else (output[0].to(CPU), *output[1:])
        )

    def _brought(self, value: Any, side: torch.device) -> Any:
        if type(value) in (tuple, list):
            return type(value)(self._brought(item, side) for item in value)
        if not isinstance(value, torch.Tensor) or value.device == side:
            return value
        key = (id(value), side)
        if key not in self._known:
            # The original is kept, so that its id is not given to another tensor.
            self._known[key] = (value, _sent(value, side))
        return self._known[key][1]


def _sent(value: torch.Tensor, side: torch.device) -> torch.Tensor:
    # Towards the CPU the host must wait: it would read what has not arrived.
    return value.to(side, non_blocking=side.type != "cpu")


def move_kv(kwargs: Mapping[str, Any], index: int, side: torch.device) -> None:
    """Take a layer's keys and values to the side that computes it. Mutates: the cache."""
    layers = getattr(cache_in(kwargs), "layers", ())
    if (
        index < len(layers)
        and getattr(layers[index], "is_initialized", False)
        and layers[index].keys.device != side
    ):
        layer = layers[index]
        layer.keys, layer.values, layer.device = layer.keys.to(side), layer.values.to(side), side
