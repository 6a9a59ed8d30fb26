"""Where the parts of an injected model will lie, by the devices of its experts operators."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.engine.assemble import accelerator_kind
from hybrimoe_plugin.hosts.transformers.devices import layer_devices
from hybrimoe_plugin.operators.experts import HybriMoEExperts

CPU = "cpu"

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def experts_operators(model: nn.Module) -> list[HybriMoEExperts]:
    return [module for module in model.modules() if isinstance(module, HybriMoEExperts)]


def experts_places(model: nn.Module) -> dict[str, str]:
    """Qualified name of every experts operator -> device on which it is used, with its number."""
    return {operator.key: real(operator.generate_device) for operator in experts_operators(model)}


def experts_on_several(model: nn.Module) -> dict[str, str]:
    """The places that are accelerators, if these are several; else empty."""
    found = {key: device for key, device in experts_places(model).items() if device != CPU}
    return found if len(set(found.values())) > 1 else {}


def dense_device(model: nn.Module) -> str:
    """Where dense weights are dequantised.

    On the one accelerator that the operators compute on, else on the CPU.
    """
    devices = set(experts_places(model).values()) - {CPU}
    return devices.pop() if len(devices) == 1 and uses_cuda(model) else CPU


def uses_cuda(model: nn.Module) -> bool:
    """Whether CUDA devices that are named count.

    They do where CUDA works, and where the model cannot be loaded without it. Else everything is
    computed on the CPU.
    """
    return cuda_refusal() is None or any(map(_needs_cuda, experts_operators(model)))


def _needs_cuda(operator: HybriMoEExperts) -> bool:
    kind, _ = accelerator_kind(operator.settings, operator.devices)
    return kind == "cuda"


def real(device: str) -> str:
    """The device that `auto` or `cuda` means here; any other is itself."""
    if device == "cuda":
        return "cuda:0"
    if device != "auto":
        return device
    return "cuda:0" if cuda_refusal() is None else CPU


def layer_of_name(name: str) -> int | None:
    """Number of the decoder layer in a qualified name; None outside the layers."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def places_of(model: nn.Module, placed: Mapping[str, str]) -> Callable[[str], str]:
    """A function from a parameter's or module's name to the device that it will lie on.

    Args:
        placed: qualified module name -> device, from rules that only place a module.
    """
    usable = uses_cuda(model)
    device = dense_device(model)
    spread = _spread(model) if usable else {}

    def place(name: str) -> str:
        for module, wanted in placed.items():
            inside = not module or f"{name}.".startswith(f"{module}.")
            if inside and (usable or wanted == CPU):
                return real(wanted)
        if not spread:
            return device
        layer = layer_of_name(name)
        # A layer without experts goes with the next one that has some; what is outside the
        # layers goes with the first, but for norm and head, which are small beside the layers.
        later = [number for number in spread if layer is None or number >= layer]
        return spread[min(later, default=max(spread))]

    return place


def _spread(model: nn.Module) -> dict[int, str]:
    """Layer -> device, where experts lie on several accelerators; else empty."""
    found = {}
    for name, device in layer_devices(experts_on_several(model)).items():
        layer = layer_of_name(name)
        if layer is not None:
            found[layer] = device
    return found
