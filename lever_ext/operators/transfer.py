"""Hidden states on their way between CPU and accelerator, and what goes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hybrimoe_plugin.compute.attention.kv_cache import cache_in

CPU = torch.device("cpu")


class LayerTransfer:
    """Takes a layer's inputs to the device that computes it, and the last result back to the CPU.

    Masks, positions and rotary factors are the same tensors for all layers of a pass: each goes
    over the link once.

        layer      0 (CPU)    1 (GPU)    2 (GPU)    3 (CPU)
        hidden            ->                     ->
        mask              ->  (known)
        KV         a layer's entries follow it where another split left them on the other side

    Args:
        device: the accelerator.
        on_device: for every layer, whether the accelerator computes it.
    """

    def __init__(self, device: torch.device, on_device: Sequence[bool]) -> None:
        self._device = device
        self._on_device = on_device
        self._known: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}
        """(id of a tensor, device) -> (the tensor, its copy there), during one pass."""

    def run(
        self,
        index: int,
        layer: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """What the layer returns, where it was computed; after the last layer on the CPU.

        Mutates: the layer's KV entries move to the device that computes it.
        """
        device = self._device if self._on_device[index] else CPU
        if index == 0:
            self._known.clear()
        hidden, *rest = args
        further = [self._moved(value, device) for value in rest]
        named = {name: self._moved(value, device) for name, value in kwargs.items()}
        move_kv(kwargs, index, device)
        output = layer(_sent(hidden, device), *further, **named)
        if index + 1 < len(self._on_device):
            return output
        self._known.clear()
        if isinstance(output, torch.Tensor):
            return output.to(CPU)
        return (output[0].to(CPU), *output[1:])

    def _moved(self, value: Any, device: torch.device) -> Any:
        """The tensors of an argument on a device."""
        if type(value) in (tuple, list):
            return type(value)(self._moved(item, device) for item in value)
        if not isinstance(value, torch.Tensor) or value.device == device:
            return value
        key = (id(value), device)
        if key not in self._known:
            # The original is kept, so that its id is not given to another tensor.
            self._known[key] = (value, _sent(value, device))
        return self._known[key][1]


def _sent(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; towards the accelerator the host does not wait."""
    # Towards the CPU the host must wait: it would read what has not arrived.
    return value.to(device, non_blocking=device.type != "cpu")


def move_kv(kwargs: Mapping[str, Any], index: int, device: torch.device) -> None:
    """Take a layer's keys and values to the device that computes it. Mutates: the cache.

    Args:
        kwargs: of the layer; the cache is among them.
        index: of the layer.
        device: where it is computed.
    """
    layers = getattr(cache_in(kwargs), "layers", ())
    if index >= len(layers):
        return
    layer = layers[index]
    if getattr(layer, "is_initialized", False) and layer.keys.device != device:
        layer.keys = layer.keys.to(device)
        layer.values = layer.values.to(device)
        layer.device = device
