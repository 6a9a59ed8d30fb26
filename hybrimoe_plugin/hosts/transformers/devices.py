"""Several accelerators: each decoder layer is on its experts' device, and hidden states follow.

Hidden states cross where a layer is on another device than the one before. What all layers read,
masks, positions and position embeddings, crosses once for each device and pass:

    device 0    embedding | layer 0 | layer 1 |                       logits
                                              | hidden states,          |
                                              | masks, positions        |
    device 1                                  + layer 2 | layer 3 | head

Between accelerators torch copies on the current stream of the source and lets the current stream of
the target wait for an event behind the copy. The host waits for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

Hook = Callable[..., Any]

_LAYER = re.compile(r"^(.*\blayers)\.(\d+)(?:\.|$)")


def layer_devices(experts: Mapping[str, str]) -> dict[str, str]:
    """Decoder layer -> device, from the experts' qualified names and devices.

    >>> layer_devices({"model.layers.1.mlp.experts": "cuda:1"})
    {'model.layers.1': 'cuda:1'}
    """
    found = {}
    for name, device in experts.items():
        match = _LAYER.match(name)
        if match is not None:
            found[f"{match[1]}.{match[2]}"] = device
    return found


def spread(model: nn.Module, experts: Mapping[str, str]) -> Callable[[], None]:
    """Move a model over several devices; gives what removes the hooks again.

    Weights stay where they are then.

    A layer without experts goes with the next layer that has some, what comes before the layers
    with the first and what comes after with the last one. Inputs follow by a hook before each of
    these modules, and cross as drawn above; the head's result goes back to where the model's inputs
    are, since the host samples there.

    Args:
        experts: qualified name of every experts operator -> its device.

    Mutates: `model`.
    """
    known = layer_devices(experts)
    stack = next(iter(known)).rpartition(".")[0]
    layers = model.get_submodule(stack)
    assert isinstance(layers, nn.ModuleList)
    devices = _device_of_each(layers, stack, known)
    first, last = devices[0], devices[-1]
    after = _after(model, stack)
    for module in _outside(model, layers):
        if module not in after:
            module.to(first)
    places = list(zip(layers, devices, strict=True))
    places += [(module, last) for module in after]
    arrivals = {device: Arrivals(torch.device(device)) for _, device in places}
    handles = []
    for module, device in places:
        module.to(device)
        handle = module.register_forward_pre_hook(arrivals[device], with_kwargs=True)
        handles.append(handle)
    head = _head(model)
    if head is not None:
        handle = head.register_forward_hook(_give_back(first))
        handles.append(handle)

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _device_of_each(layers: nn.ModuleList, stack: str, known: Mapping[str, str]) -> list[str]:
    """The device of every layer, from those of the layers with experts.

    Args:
        layers: all decoder layers.
        stack: their qualified name.
        known: qualified name of a layer with experts -> device.
    """
    last = max(known, key=_number)
    current = known[last]
    devices = []
    for index in reversed(range(len(layers))):
        name = f"{stack}.{index}"
        current = known.get(name, current)
        devices.append(current)
    devices.reverse()
    return devices


class Arrivals:
    """A hook before all modules of one device that brings their inputs there.

    transformers calls layers with keyword arguments: masks, positions and position embeddings,
    which are the same tensors for all layers of a pass. Their copies are kept for as long as they
    live, and made anew when hidden states arrive from another device: whoever calls the model may
    have written to a tensor of the last pass.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = WeakIdKeyDictionary()

    def __call__(self, _module: nn.Module, inputs: Any, named: Any) -> Any:
        hidden = inputs[0] if inputs else named.get("hidden_states")
        if not isinstance(hidden, torch.Tensor) or hidden.device != self._device:
            self._copies.clear()
        return moved(inputs, self._bring), moved(named, self._bring)

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self._device:
            return tensor
        copy: torch.Tensor | None = self._copies.get(tensor)
        if copy is None:
            copy = tensor.to(self._device, non_blocking=True)
            self._copies[tensor] = copy
        return copy


def moved(value: Any, bring: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same value with its tensors brought elsewhere, also those in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return bring(value)
    kind = type(value)
    if kind in (tuple, list):
        return kind(moved(item, bring) for item in value)
    if kind is dict:
        return {key: moved(item, bring) for key, item in value.items()}
    return value


def _give_back(device: str) -> Hook:
    """A hook after a module that brings its output to a device.

    The host samples on the device where the model's inputs are.
    """

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        return moved(output, lambda tensor: tensor.to(device, non_blocking=True))

    return hook


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


def _outside(model: nn.Module, layers: nn.Module) -> list[nn.Module]:
    """The modules without children that lie outside the layers.

    Out there, modules with children have no weights of their own.
    """
    inside = set(layers.modules())
    found = []
    for module in model.modules():
        has_children = any(True for _ in module.children())
        if module not in inside and not has_children:
            found.append(module)
    return found


def _after(model: nn.Module, stack: str) -> list[nn.Module]:
    """What runs after the layers: the final norm beside them, and the head.

    `stack` is the qualified name of the layers.
    """
    base, _, _ = stack.rpartition(".")
    beside = model.get_submodule(base)
    norm = getattr(beside, "norm", None)
    head = _head(model)
    found = [norm, head]
    return [part for part in found if part is not None]


def _head(model: Any) -> nn.Module | None:
    """The output projection of a transformers model."""
    if not hasattr(model, "get_output_embeddings"):
        return None
    head: nn.Module | None = model.get_output_embeddings()
    return head
