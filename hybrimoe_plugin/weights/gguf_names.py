"""Which GGUF tensor a parameter is stored in: the `gguf` package's name map and its exceptions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from gguf import get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES

from hybrimoe_plugin.errors import WeightsError

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"
GATE_UP_BIAS, DOWN_BIAS = f"{GATE_UP}_bias", f"{DOWN}_bias"
"""Ends of the names of a layer's routed experts, which every family's model stacks alike."""
EXPERTS = (GATE_UP, DOWN, GATE_UP_BIAS, DOWN_BIAS)

RowOrder = Callable[[Any], torch.Tensor]
"""The model's config -> where each row of a parameter is stored, [N] int64."""
Values = Callable[[torch.Tensor, Any], torch.Tensor]
"""A tensor in floating point, and the model's config -> another."""


class Change(NamedTuple):
    """How files change the values of a parameter."""

    restored: Values
    """The parameter, from what is stored."""
    stored: Values
    """What is stored, from the parameter."""


T = TypeVar("T")


@dataclass(frozen=True)
class GGUFNames:
    """How the files of a model family deviate from the `gguf` package's map of tensor names.

    The default describes files without exceptions.
    """

    mapped_as: str | None = None
    """Architecture whose map is used; None for the file's own."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """End of a parameter's name -> its GGUF tensor, where `{layer}` is the layer's number."""
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """End of a parameter's name -> the tensors whose rows it has, one behind the other."""
    rows: Mapping[str, RowOrder] = field(default_factory=dict)
    """End of a parameter's name -> where its rows are stored, if not in order.

    Quantised rows can change places too, so such a matrix may stay as stored.
    """
    values: Mapping[str, Change] = field(default_factory=dict)
    """End of a parameter's name -> how its values are changed; the first end counts.

    Such a matrix cannot stay as stored.
    """
    joined_rows: Mapping[str, Callable[[Any], Sequence[int]]] = field(default_factory=dict)
    """End of a name in `joined` -> the model's config -> rows of each tensor, if not all the same.
    """
    interleaved_experts: bool = False
    """Whether the model keeps experts' matrices transposed, with gate and up alternating.

    Files have them as those of every other family.
    """
    fused_experts: bool = False
    """Whether files keep experts' gate and up in one tensor; both forms are read of any family."""
    paired_heads: Mapping[str, str] = field(default_factory=dict)
    """Part of a parameter's name -> the config's attribute that counts its heads.

    The rows of these projections are stored in pairs: each row of a head's first half is followed
    by its partner from the second half.
    """

    def row_order(self, parameter: str, config: Any) -> torch.Tensor | None:
        """Stored row of each of a parameter's rows, [N] int64; None if they are in order."""
        order = _by_end(self.rows, parameter)
        return None if order is None else order(config)

    def change(self, parameter: str) -> Change | None:
        """How a parameter's values are changed; None if they are stored as they are."""
        return _by_end(self.values, parameter)

    def as_stored(self, parameter: str, value: torch.Tensor, config: Any) -> torch.Tensor:
        """A parameter's values and rows as files have them."""
        change = self.change(parameter)
        if change is not None:
            value = change.stored(value, config)
        order = self.row_order(parameter, config)
        if order is not None:
            value = value[order.argsort()]
        heads = self.heads_in_pairs(parameter, config)
        return to_pairs(value, heads) if heads else value

    def joined_tensors(self, parameter: str) -> tuple[str, ...]:
        """The tensors that a parameter joins; none for every other parameter."""
        for end, tensors in self.joined.items():
            if parameter.endswith(end):
                return tuple(name.format(layer=layer_number(parameter)) for name in tensors)
        return ()

    def sizes_of_joined(self, parameter: str, value: torch.Tensor, config: Any) -> list[int]:
        """Rows of each tensor that a parameter joins."""
        sizes = _by_end(self.joined_rows, parameter)
        if sizes is not None:
            return list(sizes(config))
        count = len(self.joined_tensors(parameter))
        return [len(value) // count] * count

    def heads_in_pairs(self, parameter: str, config: Any) -> int:
        """Heads of a projection whose rows are stored in pairs; 0 for every other parameter."""
        for part, attribute in self.paired_heads.items():
            if part in parameter:
                return int(getattr(config, attribute))
        return 0


def _by_end(found: Mapping[str, T], parameter: str) -> T | None:
    """The first entry whose key a name ends with."""
    return next((value for end, value in found.items() if parameter.endswith(end)), None)


class NameMap:
    """Names of one model's tensors.

    Args:
        names: the family's exceptions.
        architecture: that the file names.
        layers: decoder layers of the model.

    Raises:
        WeightsError: the `gguf` package has no map for the architecture.
    """

    def __init__(self, names: GGUFNames, architecture: str, layers: int) -> None:
        wanted = names.mapped_as or architecture
        known = {name: key for key, name in MODEL_ARCH_NAMES.items()}
        if wanted not in known:
            raise WeightsError(
                f"the gguf package has no tensor names for architecture {wanted!r}: a newer one "
                "may (pip install -U gguf), or name one whose files have the same tensors "
                "(GGUFNames.mapped_as)"
            )
        self._exceptions = names.tensors
        self._map = get_tensor_name_map(known[wanted], layers)

    def tensor(self, parameter: str) -> str | None:
        """The GGUF name of a parameter; None where there is none."""
        for end, tensor in self._exceptions.items():
            if parameter.endswith(end):
                return tensor.format(layer=layer_number(parameter))
        found: str | None = self._map.get_name(parameter, try_suffixes=(".weight", ".bias"))
        return found


def layer_number(parameter: str) -> int:
    """The decoder layer that a parameter belongs to; -1 outside the layers.

    >>> layer_number("model.layers.3.mlp.gate.weight")
    3
    """
    numbers = (int(part) for part in parameter.split(".") if part.isdigit())
    return next(numbers, -1)


def to_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Q or K from transformers' order (halves) to that of llama.cpp's files (pairs)."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `to_pairs`."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
