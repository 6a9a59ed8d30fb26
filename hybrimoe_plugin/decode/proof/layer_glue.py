"""How a decoder layer puts its parts together: residual sums, scales, and what attention gets.

Nobody tells which child of a layer is its attention. The layer's own code is run with stand-ins in
place of its children, and the order in which it calls them, with what, shows it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.decode.proof.stand_ins import (
    BATCH,
    TOKENS,
    Called,
    StandIn,
    copy_with,
    random_hidden,
    same,
)
from hybrimoe_plugin.device.torch_threads import one_thread

HANDED_ON = ("position_embeddings", "attention_mask", "position_ids")
"""What a layer hands to attention as it is, beside the cache."""


@dataclass(frozen=True)
class LayerGlue:
    """A layer that is x + a attention(norm(x)), and then x + b mlp(norm(x))."""

    input_norm: str
    """Names of its children."""
    attention: str
    mlp_norm: str
    mlp: str
    attention_scale: float = 1.0
    """a, which is 1 in most families."""
    mlp_scale: float = 1.0


@dataclass(frozen=True)
class Traced:
    """A layer's run on stand-ins."""

    layer: Any
    """The copy that was run."""
    hidden: torch.Tensor
    """[B, T, H]: what it was given."""
    named: dict[str, Any]
    """Its other arguments."""
    calls: tuple[Called, ...]
    output: torch.Tensor

    @property
    def mixer(self) -> int | None:
        """Number of the call that mixes tokens: the one that gets the position embeddings."""
        for number, call in enumerate(self.calls):
            if not call.is_of_one:
                return number
        return None


def traces(layer: nn.Module) -> Iterator[Traced]:
    """Runs of a layer on stand-ins: all give tensors, or one gives a pair, or two do.

    Runs that end with an error are left out.
    """
    names = list(layer._modules)
    for pairs in ((), *combinations(names, 1), *combinations(names, 2)):
        try:
            yield _trace(layer, pairs)
        except Exception:  # code that was not made for stand-ins may raise anything
            continue


@one_thread()
def glue_of(layer: nn.Module) -> LayerGlue | None:
    """How a layer puts its parts together; None where it is not of this form.

    The layer's weights are not read, it may lie on the meta device.
    """
    if any(True for _ in layer.parameters(recurse=False)):
        return None
    for trace in traces(layer):
        glue = _glue(layer, trace)
        if glue is not None:
            return glue
    return None


@torch.no_grad()
def _trace(layer: nn.Module, pairs: tuple[str, ...]) -> Traced:
    calls: list[Called] = []
    with torch.device("cpu"):
        return _traced(layer, pairs, calls)


def _traced(layer: nn.Module, pairs: tuple[str, ...], calls: list[Called]) -> Traced:
    made = copy_with(layer, lambda name, child: StandIn(name, child, calls, name in pairs))
    hidden = random_hidden(_width(layer))
    named = _arguments(layer)
    output = made.forward(hidden, **named)
    if not isinstance(output, torch.Tensor) or output.shape != hidden.shape:
        raise TypeError("a layer gives hidden states")
    return Traced(made, hidden, named, tuple(calls), output)


def _glue(layer: nn.Module, trace: Traced) -> LayerGlue | None:
    calls = trace.calls
    if len(calls) != 4 or len({call.name for call in calls}) != 4:
        return None
    norm, mixer, mlp_norm, mlp = calls
    in_order = same(norm.hidden, trace.hidden) and same(mixer.hidden, norm.output)
    if not in_order or not same(mlp.hidden, mlp_norm.output):
        return None
    if not (norm.is_of_one and mlp_norm.is_of_one and mlp.is_of_one and _hands_on(trace, mixer)):
        return None
    total = mlp_norm.hidden
    first = _scale(layer, total, trace.hidden, mixer.output)
    second = _scale(layer, trace.output, total, mlp.output)
    if first is None or second is None:
        return None
    return LayerGlue(norm.name, mixer.name, mlp_norm.name, mlp.name, first, second)


def _hands_on(trace: Traced, mixer: Called) -> bool:
    """Whether attention gets the very objects that the layer was given."""
    given = [*mixer.given, *mixer.named.values()]
    wanted = [value for name, value in trace.named.items() if name in HANDED_ON]
    return all(any(value is each for each in given) for value in wanted)


def _scale(
    layer: nn.Module, total: torch.Tensor, residual: torch.Tensor, part: torch.Tensor
) -> float | None:
    """The s in total = residual + s part, which is 1 or an attribute of the layer."""
    numbers = [value for value in vars(layer).values() if isinstance(value, float)]
    for scale in (1.0, *numbers):
        if same(total, residual + scale * part):
            return scale
    return None


def _arguments(layer: nn.Module) -> dict[str, Any]:
    """What a model gives a layer beside hidden states, as far as the layer knows it."""
    angles = torch.ones(1, TOKENS, 2)
    offered: dict[str, Any] = {
        "position_embeddings": (angles, angles.clone()),
        "attention_mask": torch.zeros(BATCH, 1, TOKENS, TOKENS),
        "position_ids": torch.arange(TOKENS)[None],
        cache_name(layer): None,
    }
    parameters = inspect.signature(layer.forward).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}


def _width(layer: nn.Module) -> int:
    """H, as the layer's norms have it."""
    for child in layer.children():
        vectors = [value for value in child.parameters() if value.ndim == 1]
        if vectors and not child._modules:
            return len(vectors[0])
    return 8
