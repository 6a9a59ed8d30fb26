"""Fused operators by proof: run once beside the module that they are to replace."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.device.torch_threads import one_thread
from hybrimoe_plugin.operators.attention import AttentionOperator
from hybrimoe_plugin.operators.proof.stage import Stage, place_of
from hybrimoe_plugin.operators.proof.twin import twin

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Relative error of a token's values that is still float32's rounding, by far."""

_SCALES = (1.0, 1e-4, 1e-2, 10.0, 1e3)
"""Sizes of the tokens that norms and MLPs are compared on: epsilons and clamps show."""

_PLAIN = (bool, int, float, str, tuple, list, dict, type(None))
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"layer_idx"}
"""Attributes by which modules of one kind may differ."""


class Proofs:
    """Which fused operators may replace which modules of a model.

    Operator and module are built once more for each kind of module, with random weights, and
    compared on random input. Modules are of one kind where class, settings and shapes are the
    same, and those of their layer.

    Args:
        model: a transformers model, on the meta device or not. Its weights are not read.
        config: of the model, as operators are given it.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        self._model = model
        self._config = config
        self._reasons: dict[str, str] = {}
        self._kept: dict[tuple[str, str, str], list[str]] = {}

    def declines(self, name: str, module: nn.Module, operator: type[nn.Module]) -> bool:
        """Whether an operator is used by proof only, and there is none for this module."""
        if not getattr(operator, "by_proof", False):
            return False
        kind = self._kind(name, module, operator)
        if kind not in self._reasons:
            self._reasons[kind] = self._reason(name, module, operator)
        reason = self._reasons[kind]
        if reason:
            kept = operator.__name__, type(module).__name__, reason
            self._kept.setdefault(kept, []).append(name)
        return bool(reason)

    def report(self, level: int = logging.WARNING) -> None:
        """Say once which modules stay as they are, and why."""
        for (operator, module, reason), names in self._kept.items():
            others = "" if len(names) == 1 else f" and {len(names) - 1} more"
            log.log(
                level,
                "%s%s: %s is not used in place of %s, which stays as it is: %s",
                names[0],
                others,
                operator,
                module,
                reason,
            )

    def _kind(self, name: str, module: nn.Module, operator: type[nn.Module]) -> str:
        place = place_of(self._model, name)
        layer = None if place is None else _settings(place.layer)
        parts = [_settings(part) for part in module.modules()]
        shapes = [(key, tuple(value.shape)) for key, value in module.named_parameters()]
        return repr((operator, layer, parts, shapes))

    @one_thread()
    def _reason(self, name: str, module: nn.Module, operator: type[nn.Module]) -> str:
        """Why the operator is not proved equal; empty where it is."""
        own = getattr(operator, "reason_against", None)
        if own is not None:
            return str(own(module))
        generator = torch.Generator().manual_seed(0)
        try:
            right = twin(module, generator)
            with torch.device("cpu"):
                ours = operator(
                    name,
                    None,
                    self._config,
                    right,
                    prefill_device="cpu",
                    generate_device="cpu",
                    dense="dequantised",
                ).eval()
            unused = _names(right) - _names(ours)
            if unused:
                return f"it does not use {', '.join(sorted(unused))}"
            if issubclass(operator, AttentionOperator):
                return self._attention_differs(name, ours, right)
            return _function_differs(ours, right)
        except Exception as error:  # modules of any kind may be named, and raise anything
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]

    def _attention_differs(self, name: str, ours: nn.Module, right: nn.Module) -> str:
        if not getattr(self._model, "_supports_sdpa", True):
            return "its model does not compute attention as sdpa does"
        place = place_of(self._model, name)
        if place is None:
            return "it is in no list of layers"
        stage = Stage(self._model, place)
        return _compared(stage.outputs(ours), stage.outputs(right))


def _function_differs(ours: nn.Module, right: nn.Module) -> str:
    """The same for a function of one tensor."""
    if len(inspect.signature(right.forward).parameters) != 1:
        return "it takes further arguments"
    x = torch.randn(2, len(_SCALES), _width(right), generator=torch.Generator().manual_seed(1))
    x = x * torch.tensor(_SCALES)[:, None]
    with torch.no_grad():
        return _compared([ours(x)], [right(x)])


def _width(module: Any) -> int:
    """Of what a norm or an MLP is given."""
    linear = getattr(module, "gate_proj", None)
    return module.weight.shape[-1] if linear is None else linear.in_features


def _compared(ours: Iterable[torch.Tensor], right: Iterable[torch.Tensor]) -> str:
    """How far two are apart, token by token; empty where it is rounding."""
    for found, wanted in zip(ours, right, strict=True):
        if found.shape != wanted.shape:
            return f"it gives {list(found.shape)} in place of {list(wanted.shape)}"
        size = wanted.norm(dim=-1).clamp_min(1e-20)
        error = float(((found - wanted).norm(dim=-1) / size).max())
        if not error <= TOLERANCE:
            return f"its values differ (by {error:.2g} of their size on random input)"
    return ""


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


def _settings(module: nn.Module) -> tuple[Any, ...]:
    return type(module), tuple(_plain_attributes(module))


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Those that a module's own class has set."""
    for name, value in sorted(vars(module).items()):
        if name not in _OF_EVERY_MODULE and isinstance(value, _PLAIN):
            yield name, value
