"""Accelerators that are not there, as tensors that compute on the CPU and remember their device.

Operations on tensors of two devices are errors, as on a real machine. Copies between devices are
noted, and so is whatever would stop the host: reading a value, sizes that depend on values, copies
to the CPU. The devices are called `meta:0` and `meta:1`, since torch lets anybody use that name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FIRST, SECOND = torch.device("meta:0"), torch.device("meta:1")
STOPS = ("_local_scalar_dense", "nonzero", "_unique", "masked_select", "is_nonzero", "equal")


class OnDevice(torch.Tensor):
    """A tensor of a device; `values` are on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of `Devices`")


class Devices(TorchDispatchMode):
    """While entered, tensors may be on these devices.

    Attributes:
        crossings: shapes of the tensors that were copied from one device to the other.
        stops: operations that would have made the host wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[tuple[int, ...]] = []
        self.stops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        # Numbers may come from the CPU; empty tensors lose their index in `torch.tensor`.
        found = {
            part.device
            for part in given
            if part.numel() and (part.dim() or isinstance(part, OnDevice))
        }
        asked = kwargs.get("device")
        device = asked or next(iter(found), None)
        if name == "copy_":
            device = args[0].device
        elif len(found) > 1:
            raise RuntimeError(f"{name}: expected tensors of one device, found {found}")
        if name in ("copy_", "_to_copy") and found != {device}:
            self._copied(given[-1], device)
        if name.startswith(STOPS) and FIRST.type in {part.type for part in found}:
            self.stops.append(name)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map(_values, args), **tree_map(_values, kwargs))
        if func._schema.name.endswith("_") and isinstance(args[0], torch.Tensor):
            return args[0]
        if device is None or device.type == "cpu":
            return result
        return tree_map(lambda part: _on(part, device), result)

    def _copied(self, tensor: torch.Tensor, device: torch.device) -> None:
        kinds = {tensor.device.type, device.type}
        if kinds == {FIRST.type}:
            self.crossings.append(tuple(tensor.shape))
        elif device.type == "cpu":
            self.stops.append("copy to the CPU")


def move(module: nn.Module, device: str | torch.device) -> nn.Module:
    """`Module.to` for these devices; it takes every module's own tensors."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None:
                    values = value.values if isinstance(value, OnDevice) else value.detach()
                    there = OnDevice(values, torch.device(device))
                    held[name] = nn.Parameter(there, False) if held is part._parameters else there
    return module


def _values(part: Any) -> Any:
    if isinstance(part, OnDevice):
        return part.values
    if isinstance(part, torch.Tensor) and part.is_meta:
        assert part.numel() == 0, "only empty tensors may be without values"
        return torch.empty(part.shape, dtype=part.dtype)
    return part


def _on(part: Any, device: torch.device) -> Any:
    return OnDevice(part, device) if isinstance(part, torch.Tensor) else part
