"""A model's own way to one module of a decoder layer, without the rest of the model.

A model prepares masks, positions and a cache, and its layers hand them to attention. What arrives
there differs from family to family, so it is not made up: the model's own code runs, on random
hidden states in place of embedded tokens, with everything left out that would need weights.

    model's forward -- masks, rotary embedding --> layer 0 .. n-1: hand on what they are given
                                                   layer n: norms hand on, the module is called
                                                   nothing behind it is
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from hybrimoe_plugin.compute.attention.kv_cache import cache_name
from hybrimoe_plugin.operators.proof.twin import NoTwinError, bare_copy, twin

_SMALL = 1 << 20
"""Values of a model's part beside its layers, such as a norm, of which a twin is made."""


class Place(NamedTuple):
    """Where a module of a decoder layer is."""

    base: nn.Module
    """The model that holds the list of layers."""
    layers: str
    """The list's name in it."""
    number: int
    """Of the layer in it."""
    path: tuple[str, ...]
    """Names from the layer down to the module."""

    @property
    def layer(self) -> nn.Module:
        layer: nn.Module = getattr(self.base, self.layers)[self.number]
        return layer


def place_of(model: nn.Module, name: str) -> Place | None:
    """The place of a module by its qualified name; None where it is in no list of layers."""
    parts = name.split(".")
    for depth in range(len(parts) - 1):
        found = model.get_submodule(".".join(parts[: depth + 1]))
        if isinstance(found, nn.ModuleList):
            base = model.get_submodule(".".join(parts[:depth]))
            return Place(base, parts[depth], int(parts[depth + 1]), tuple(parts[depth + 2 :]))
    return None


class Call(NamedTuple):
    """One pass of a sequence of passes that share a cache."""

    tokens: int
    scales: tuple[float, ...] = (1.0, 0.03, 3.0, 0.3, 8.0)
    """Sizes of the tokens' hidden states, in turn: clamps show in large ones, epsilons in small."""
    padded: int = 0
    """Tokens of padding in front of the first of two sequences; 0 for one sequence."""
    first_position: int | None = None
    """Position of the first token; None: the model counts."""


PASSES: tuple[tuple[Call, ...], ...] = (
    (Call(5), Call(1), Call(3)),
    (Call(6, padded=3), Call(1, padded=3)),
    (Call(4, first_position=40_000),),
)
"""A prompt, a step and a few tokens behind it; a padded batch; positions far away."""


class Stage:
    """Runs modules in one place of a model, which is not changed and whose weights are not read.

    Args:
        model: a transformers model; on the meta device it may be of any size.
        place: of the module.

    Raises:
        NoTwinError: a computed buffer of the model cannot be computed anew.
    """

    def __init__(self, model: Any, place: Place) -> None:
        self._place = place
        self._base = place.base
        self._config: Any = getattr(place.base, "config", None) or model.config
        self._parts = self._parts_beside_layers()

    @torch.no_grad()
    def outputs(self, module: nn.Module) -> Iterator[torch.Tensor]:
        """What the module gives in all of `PASSES`, each [real tokens, H] float32.

        Raises:
            Exception: of any kind, where it or the model cannot be run like this.
        """
        generator = torch.Generator().manual_seed(1)
        for calls in PASSES:
            cache = DynamicCache(config=self._config)
            mask = torch.ones(2 if calls[0].padded else 1, 0, dtype=torch.int64)
            for call in calls:
                mask = torch.cat((mask, mask.new_ones(len(mask), call.tokens)), dim=1)
                mask[0, : call.padded] = 0
                given = mask if call.padded else None
                output = self._run(module, call, len(mask), given, cache, generator)
                yield output[mask[:, -call.tokens :].bool()]

    def _run(
        self,
        module: nn.Module,
        call: Call,
        batch: int,
        mask: torch.Tensor | None,
        cache: Any,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """[B, T, H] of one pass. Mutates: the cache."""
        shape = batch, call.tokens, self._config.hidden_size
        hidden = torch.randn(shape, generator=generator)
        scales = torch.tensor(call.scales).repeat(call.tokens)[: call.tokens]
        positions = {}
        if call.first_position is not None:
            first = call.first_position
            positions["position_ids"] = torch.arange(first, first + call.tokens)[None]
        base = self._copy_with(module)
        try:
            base(
                inputs_embeds=hidden * scales[:, None],
                attention_mask=mask,
                use_cache=True,
                **positions,
                **{cache_name(self._base): cache},
            )
        except _ReachedError as reached:
            _fill_others(cache, self._place.number, batch, call.tokens)
            return _hidden_of(reached.output)
        raise NoTwinError("its layer does not call it")

    def _copy_with(self, module: nn.Module) -> Any:
        base = bare_copy(self._base)
        base._modules.update(self._parts)
        layers = getattr(self._base, self._place.layers)
        before = [handing_on(layer) for layer in layers[: self._place.number]]
        own = _with_module(layers[self._place.number], self._place.path, module)
        base._modules[self._place.layers] = nn.ModuleList([*before, own])
        return base

    def _parts_beside_layers(self) -> dict[str, nn.Module]:
        """Twins of what is beside the layers, and rotary embeddings with their frequencies."""
        parts = {}
        generator = torch.Generator().manual_seed(0)
        for name, child in self._base.named_children():
            values = sum(value.numel() for value in child.parameters())
            if name == self._place.layers or values > _SMALL:
                continue
            if any(buffer.is_meta for buffer in child.buffers()):
                parts[name] = _made_anew(child, self._config)
            else:
                parts[name] = twin(child, generator)
        return parts


class _ReachedError(Exception):
    """Ends a pass behind the module that it was made for."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class _Last(nn.Module):
    """Calls a module and ends the pass; all else is the module's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _ReachedError(self.module(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def handing_on(module: nn.Module) -> Any:
    """A copy that gives what it is given first."""
    made = bare_copy(module)
    made.__dict__["forward"] = _first
    return made


def _first(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _with_module(layer: nn.Module, path: tuple[str, ...], module: nn.Module) -> Any:
    """A copy of a layer that calls this module in a place, and hands on in all others."""
    if not path:
        return _Last(module)
    made = bare_copy(layer)
    for name, child in layer._modules.items():
        if name == path[0]:
            assert child is not None
            made._modules[name] = _with_module(child, path[1:], module)
        elif child is not None:
            made._modules[name] = handing_on(child)
    return made


def _made_anew(module: nn.Module, config: Any) -> nn.Module:
    """A module of the same class with its computed buffers."""
    made_by: Any = type(module)
    try:
        with torch.device("cpu"):
            made: nn.Module = made_by(config)
    except Exception as error:
        raise NoTwinError(f"{type(module).__name__} cannot be made anew: {error}") from error
    return made


def _fill_others(cache: Any, index: int, batch: int, tokens: int) -> None:
    """Let the other layers' caches hold as many tokens, by which the model counts positions."""
    held = torch.zeros(batch, 1, tokens, 1)
    for other, layer in enumerate(cache.layers):
        if other != index and hasattr(layer, "keys"):
            cache.update(held, held, other)


def _hidden_of(output: Any) -> torch.Tensor:
    """[B, T, H] of what attention gives: it comes first of two, and there are no weights.

    Raises:
        NoTwinError: something else is given, which the layer may make use of.
    """
    if isinstance(output, tuple) and len(output) == 2 and output[1] is None:
        hidden: torch.Tensor = output[0]
        return hidden
    raise NoTwinError(f"it gives {type(output).__name__}, not hidden states and None")
