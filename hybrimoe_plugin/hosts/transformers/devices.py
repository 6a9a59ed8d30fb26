"""Several accelerators: every decoder layer lies with its experts, and hidden states go from one to
the next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

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
    """Move a model over several devices; gives what removes the hooks again (weights stay where
    they are).

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
    devices: list[str] = []
    current = known[max(known, key=_number)]
    for index in reversed(range(len(layers))):
        current = known.get(f"{stack}.{index}", current)
        devices.insert(0, current)
    places = [(layer, device) for layer, device in zip(layers, devices, strict=True)]
    after = _after(model, stack)
    for module in (child for child in _outside(model, layers) if child not in after):
        module.to(devices[0])
    places += [(module, devices[-1]) for module in after]
    handles = []
    for module, device in places:
        module.to(device)
        handles.append(module.register_forward_pre_hook(_bring(device), with_kwargs=True))
    head = _head(model)
    if head is not None:
        handles.append(
            head.register_forward_hook(lambda _module, _inputs, output: moved(output, devices[0]))
        )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def moved(value: Any, device: str | torch.device) -> Any:
    """The same value with its tensors on the device: tensors, tuples, lists and dicts; others are
    left alone.
    """
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value


def _bring(device: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        return moved(inputs, device), moved(named, device)

    return hook


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


def _outside(model: nn.Module, layers: nn.Module) -> list[nn.Module]:
    """The modules without children that lie outside the layers."""
    inside = set(layers.modules())
    return [
        module for module in model.modules() if module not in inside and not list(module.children())
    ]


def _after(model: nn.Module, stack: str) -> list[nn.Module]:
    """What runs after the layers: the final norm beside them, and the head."""
    beside = model.get_submodule(stack.rpartition(".")[0])
    found = [module for name, module in beside.named_children() if name == "norm"]
    head = _head(model)
    return found if head is None else [*found, head]


def _head(model: Any) -> nn.Module | None:
    """The output projection of a transformers model."""
    head: nn.Module | None = (
        model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    )
    return head
