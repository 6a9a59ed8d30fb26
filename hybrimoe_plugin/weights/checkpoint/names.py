"""Which tensors of a checkpoint make up which parameter of the transformers model.

transformers renames and joins what older checkpoints hold (experts one by one, for example) by
rules that it keeps for each model type. They are its own functions and objects here, so that every
type is read as transformers reads it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hybrimoe_plugin.errors import WeightsError

_SHOWN = 8
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_COMPUTED = ".rotary_emb.inv_freq"


class Source(NamedTuple):
    """One tensor of a checkpoint, and its part in a conversion."""

    tensor: str
    pattern: str
    """Which of the conversion's patterns its name matches."""


@dataclass(frozen=True)
class Piece:
    """Where a parameter comes from."""

    parameter: str
    """The first parameter that the conversion makes."""
    sources: tuple[Source, ...]
    """In the order in which transformers adds them."""
    converter: Any = None
    """transformers' conversion; None where one tensor is the parameter as it is."""

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(source.tensor for source in self.sources)

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the conversion's operations, in order; empty where there is none."""
        if self.converter is None:
            return ()
        return tuple(type(step).__name__ for step in self.converter.operations)

    def by_pattern(self) -> list[list[str]]:
        """Tensors of each pattern, in the order of the conversion's patterns."""
        found: dict[str, list[str]] = {pattern: [] for pattern in self.converter.source_patterns}
        for source in self.sources:
            found[source.pattern].append(source.tensor)
        return list(found.values())

    def convert(self, values: Mapping[str, torch.Tensor], model: Shapes) -> dict[str, Any]:
        """What the conversion makes of tensors by name: parameters by name."""
        converter = deepcopy(self.converter)
        for tensor, pattern in self.sources:
            converter.add_tensor(self.parameter, tensor, pattern, values[tensor])
        made: dict[str, Any] = converter.convert(self.parameter, model=model, config=model.config)
        return made


@dataclass(frozen=True)
class Shapes:
    """What transformers' conversions ask of a model, as it is before operators are put into it."""

    config: Any
    parameters: Mapping[str, torch.Tensor]
    """On the meta device."""

    def get_parameter(self, name: str) -> torch.Tensor:
        """A parameter or buffer by its qualified name."""
        return self.parameters[name]


@dataclass(frozen=True)
class Names:
    """All parameters of one model."""

    model: Shapes
    pieces: Mapping[str, Piece]
    """By the parameter's name."""


def find_names(model: Any, tensors: Collection[str], where: str) -> Names:
    """Find every parameter's tensors, and a parameter for every tensor.

    Args:
        model: the transformers model, usually on the meta device.
        tensors: names in the checkpoint.
        where: the checkpoint, for messages.

    Raises:
        WeightsError: naming tensors that are missing, and those that the model has no place for.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    parameters = model.state_dict()
    # A copy of what they are tied to has been left out: what is left is something else.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    prefix = model.base_model_prefix
    found: dict[str, list[Source]] = {}
    unused = []
    for tensor in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(tensor, renamings, converters, prefix, parameters)
        if name not in parameters:
            name, pattern = rename_source_key(tensor, [], [], prefix, parameters)
        if name in parameters and name not in tied:
            found.setdefault(name, []).append(Source(tensor, pattern or ""))
        elif not _may_be_skipped(model, name) and not _may_be_skipped(model, tensor):
            unused.append(tensor)
    pieces: dict[str, Piece] = {}
    for name, sources in found.items():
        converter = by_pattern.get(sources[0].pattern)
        piece = Piece(name, tuple(sources), converter)
        pieces |= dict.fromkeys(_made(name, converter), piece)
    missing = [name for name in parameters if name not in pieces and name not in tied]
    _check(model, missing, unused, where)
    return Names(Shapes(model.config, parameters), pieces)


def _made(name: str, converter: Any) -> list[str]:
    """The parameters that a conversion makes, whose first one has this name."""
    if converter is None or len(converter.target_patterns) == 1:
        return [name]
    first, *_ = converter.target_patterns
    return [name.replace(first, target) for target in converter.target_patterns]


def _may_be_skipped(model: Any, name: str) -> bool:
    """Whether a tensor that is no parameter may be left out."""
    layer = _LAYER.search(name)
    if layer is not None and int(layer[1]) >= model.config.num_hidden_layers:
        return True  # a layer that predicts further tokens; plain decoding does not use it
    if name.endswith(_COMPUTED):  # from the config
        return True
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _check(model: Any, missing: list[str], unused: list[str], where: str) -> None:
    wrong = []
    if missing:
        wrong.append(f"nothing there for {_listed(missing)}")
    if unused:
        wrong.append(f"the model has no place for {_listed(unused)}")
    if wrong:
        raise WeightsError(
            f"{where}: does not hold a {model.config.model_type} model: {'; '.join(wrong)}"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    if len(names) <= _SHOWN:
        return shown
    return f"{shown} and {len(names) - _SHOWN} more"
