"""What a model's own experts compute, read off the module that an operator replaces.

transformers marks nearly every experts class by one decorator, `use_experts_implementation`, which
puts its switches on the module: whether there is a gate, whether there are biases, how the matrices
lie. The activation is found by its values: the module's own `_apply_gate` is called on numbers, and
what comes out is compared with what we can compute. A config's `hidden_act` would not do, since
several families say `silu` there and clamp, scale or shift as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.compute.activation import activate
from hybrimoe_plugin.core import ACTIVATIONS, Activation
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.expert_form import ExpertForm

_LIMITS = ("limit", "swiglu_limit")
_ALPHAS = ("alpha", "swiglu_alpha")
"""Names of the clamp's bound and of the factor inside the sigmoid, where a module has them."""


def read_form(key: str, module: nn.Module) -> ExpertForm:
    """The form of a transformers experts module, which may lie on the meta device.

    Raises:
        BackendError: it computes something that the engine does not, named by its class.
    """
    name = type(module).__name__
    if not hasattr(module, "has_gate"):
        raise _refused(key, name, "they have no form that transformers' other families share")
    if not module.has_gate:
        raise _refused(key, name, "they have no gate projection")
    if getattr(module, "has_post_expert_norm", False):  # older releases know no such experts
        raise _refused(key, name, "each expert's output goes through a norm")
    down = _shape(key, module, "down_proj")
    packed = _shape(key, module, "gate_up_proj")
    if module.is_transposed:
        down = (down[0], down[2], down[1])
        packed = (packed[0], packed[2], packed[1])
    experts, hidden, intermediate = down
    if packed != (experts, 2 * intermediate, hidden):
        raise _refused(key, name, f"gate_up_proj is {packed} beside a down_proj of {down}")
    return ExpertForm(
        experts,
        hidden,
        intermediate,
        _activation(key, module),
        bool(module.has_bias),
        bool(module.is_transposed),
        not module.is_concatenated,
    )


def _shape(key: str, module: nn.Module, name: str) -> tuple[int, int, int]:
    parameter = getattr(module, name, None)
    if not isinstance(parameter, torch.Tensor) or parameter.ndim != 3:
        raise _refused(key, type(module).__name__, f"{name} is no stack of matrices")
    first, second, third = parameter.shape
    return first, second, third


def _activation(key: str, module: Any) -> Activation:
    """Which of ours the module computes.

    Raises:
        BackendError: none of them.
    """
    gate, up = _probe()
    packed = torch.cat((gate, up), dim=-1)
    if not module.is_concatenated:
        packed = torch.stack((gate, up), dim=-1).flatten(-2)
    try:
        with torch.no_grad():
            wanted = module._apply_gate(packed)
    except Exception as error:  # whatever a model's own code may raise
        raise _refused(
            key, type(module).__name__, f"their activation cannot be tried ({error})"
        ) from error
    for candidate in _candidates(module):
        if wanted.shape == gate.shape and torch.allclose(activate(gate, up, candidate), wanted):
            return candidate
    raise _refused(
        key,
        type(module).__name__,
        f"their activation is none of {', '.join(ACTIVATIONS)}, clamped or not",
    )


def _probe() -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, up) [N, N] float64: every pair of values from -2^20 to 2^20.

    Dense around 0, to tell gelu from its approximation, and then far enough apart to find a clamp
    wherever it is: one beyond the last value would pass for none.
    """
    dense = torch.linspace(-12, 12, 97, dtype=torch.float64, device="cpu")
    large = 2.0 ** torch.arange(4, 21, dtype=torch.float64, device="cpu")
    values = torch.cat((-large, dense, large))
    gate, up = torch.meshgrid(values, values, indexing="ij")
    return gate.contiguous(), up.contiguous()


def _candidates(module: Any) -> Iterator[Activation]:
    limits = [0.0, *_numbers(module, _LIMITS)]
    alphas = [1.0, *_numbers(module, _ALPHAS)]
    for kind, limit, shift in itertools.product(ACTIVATIONS, limits, (0.0, 1.0)):
        for alpha in alphas if kind == "silu" else alphas[:1]:
            yield Activation(kind, alpha, limit, shift)


def _numbers(module: Any, names: tuple[str, ...]) -> list[float]:
    found = (getattr(module, name, None) for name in names)
    return [float(value) for value in found if isinstance(value, int | float)]


def _refused(key: str, name: str, why: str) -> BackendError:
    return BackendError(f"{key}: experts of {name} are not supported: {why}")
