"""Several accelerators: each decoder layer is on its experts' device, and hidden states follow."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

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
    these modules; the head's result goes back to where the model's inputs are, since the host
    samples there.

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
    handles = []
    for module, device in places:
        module.to(device)
        handle = module.register_forward_pre_hook(_follow(device), with_kwargs=True)
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


def moved(value: Any, device: str | torch.device) -> Any:
    """The same value with its tensors on the device, also those in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    kind = type(value)
    if kind in (tuple, list):
        return kind(moved(item, device) for item in value)
    if kind is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value


def _follow(device: str) -> Hook:
    """A hook before a module that brings its inputs to its device.

    transformers calls layers with keyword arguments: masks and position embeddings come with them.
    """

    def hook(_module: Any, inputs: Any, named: Any) -> Any:
        here = moved(inputs, device)
        named_here = moved(named, device)
        return here, named_here

    return hook


def _give_back(device: str) -> Hook:
    """A hook after a module that brings its output to a device.

    The host samples on the device where the model's inputs are.
    """

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        return moved(output, device)

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
