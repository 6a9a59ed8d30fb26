"""The blocks of a model's pack: what one read fetches, and where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from hybrimoe_plugin.errors import ConfigError
from lever_ext.flash.format import (
    ALIGNMENT,
    DTYPES,
    TENSOR_ALIGNMENT,
    Block,
    PackedTensor,
    align,
)

FIRST, IN_LAYERS, LAST = range(3)
"""Stages of a pass: embeddings; decoder layers; final norm and output head."""


class _Place(NamedTuple):
    """A block's place in the order of execution, by which blocks are sorted."""

    stage: int
    layer: int
    """-1 for blocks that belong to no layer."""
    is_expert: bool
    """A layer's own block comes before its experts."""
    expert: int
    """-1 but for experts."""

    @property
    def kind(self) -> str:
        if self.layer < 0:
            return "resident"
        return "expert" if self.is_expert else "layer"


class _Member(NamedTuple):
    """A tensor of a block."""

    name: str
    shape: tuple[int, ...]


def plan_blocks(model: nn.Module, dtype: str) -> list[Block]:
    """The blocks of a model's pack in the order of execution, without checksums.

    Args:
        model: on the meta device; its parameters' names and shapes are all that is used.
        dtype: one of `DTYPES`.

    Raises:
        ConfigError: unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    groups: dict[_Place, list[_Member]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        for place, member in _parts(name, shape):
            groups.setdefault(place, []).append(member)
    blocks = []
    offset = ALIGNMENT
    for place in sorted(groups):
        block = _block(place, offset, groups[place], dtype)
        blocks.append(block)
        offset += block.nbytes
    return blocks


def _parts(name: str, shape: tuple[int, ...]) -> list[tuple[_Place, _Member]]:
    """The blocks that a parameter lies in: one, or one for each expert of a stacked tensor."""
    layer = _layer_of(name)
    if layer < 0:
        stage = FIRST if "embed" in name else LAST
        return [(_Place(stage, -1, False, -1), _Member(name, shape))]
    if ".experts." not in name:
        return [(_Place(IN_LAYERS, layer, False, -1), _Member(name, shape))]
    member = _Member(name, shape[1:])
    return [(_Place(IN_LAYERS, layer, True, expert), member) for expert in range(shape[0])]


def _layer_of(name: str) -> int:
    """The decoder layer that a parameter's name belongs to, or -1."""
    parts = name.split(".")
    for part, following in zip(parts, parts[1:], strict=False):
        if part == "layers":
            return int(following)
    return -1


def _block(place: _Place, offset: int, members: Sequence[_Member], dtype: str) -> Block:
    tensors = []
    inside = 0
    for name, shape in members:
        tensor = PackedTensor(name, dtype, shape, inside)
        tensors.append(tensor)
        inside = align(inside + tensor.nbytes, TENSOR_ALIGNMENT)
    return Block(
        kind=place.kind,
        layer=place.layer,
        expert=place.expert,
        offset=offset,
        nbytes=align(inside),
        crc=0,
        tensors=tuple(tensors),
    )
