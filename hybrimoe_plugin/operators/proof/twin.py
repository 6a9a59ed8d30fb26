"""Copies of modules with random weights, to be run where the weights themselves must not be."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

RANK = 16
"""Of the matrices of a twin's linears, which makes them cheap at any size."""
MOST_VALUES = 1 << 24
"""Of a parameter that is not a linear's matrix: a twin holds it in full."""


class NoTwinError(Exception):
    """A module whose twin cannot be made; the message says why."""


class LowRankLinear(nn.Module):
    """A random linear in place of an `nn.Linear` of the same shape.

    Its matrix is a product [out, r] x [r, in], so that a matrix of a billion values costs
    nothing.
    """

    def __init__(self, linear: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        rank = min(RANK, self.in_features, self.out_features)
        self._into = _normal((self.in_features, rank), generator) * self.in_features**-0.5
        self._out_of = _normal((rank, self.out_features), generator) * rank**-0.5
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(_normal((self.out_features,), generator))

    @property
    def weight(self) -> torch.Tensor:
        """[out, in] float32, fresh; for modules that multiply by it themselves."""
        return self._out_of.t() @ self._into.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N] from [..., M]."""
        y = x @ self._into @ self._out_of
        return y if self.bias is None else y + self.bias


def twin(module: nn.Module, generator: torch.Generator) -> Any:
    """A module of the same class and settings with random float32 weights on the CPU.

    The module itself may lie on any device, the meta device too. Nothing of it is read but
    attributes and shapes, and computed buffers where they are there.

    Raises:
        NoTwinError: a parameter is too large, or nobody knows what is in a buffer.
    """
    if type(module) is nn.Linear:
        return LowRankLinear(module, generator)
    made = bare_copy(module)
    for name, value in module._parameters.items():
        if value is not None:
            made._parameters[name] = nn.Parameter(_random(name, value, generator))
    for name, buffer in module._buffers.items():
        if buffer is not None:
            made._buffers[name] = _buffer(module, name, buffer, generator)
    for name, child in module._modules.items():
        if child is not None:
            made._modules[name] = twin(child, generator)
    return made.eval()


def bare_copy(module: nn.Module) -> Any:
    """A shallow copy whose parameters, buffers and children can be exchanged; it has no hooks."""
    made = copy.copy(module)
    own = made.__dict__
    for name in ("_parameters", "_buffers", "_modules"):
        own[name] = dict(own[name])
    for name in list(own):
        if name.endswith("_hooks") and isinstance(own[name], OrderedDict):
            own[name] = OrderedDict()
    return made


def _random(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if value.numel() > MOST_VALUES:
        raise NoTwinError(f"its {name} has {value.numel()} values")
    if value.ndim < 2:
        # Gains are positive, and neither a gain of 1 nor a bias of 0 would be seen.
        return torch.rand(value.shape, generator=generator, device="cpu") + 0.5
    return _normal(value.shape, generator) * value.shape[-1] ** -0.5


def _buffer(
    module: nn.Module, name: str, value: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    if name not in module._non_persistent_buffers_set and value.is_floating_point():
        return _random(name, value, generator)
    if value.is_meta:
        raise NoTwinError(f"nobody knows what its buffer {name} holds")
    return value.detach().cpu().clone()


def _normal(shape: Any, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device="cpu")
