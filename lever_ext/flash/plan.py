"""The blocks of a model's pack: what one read fetches, and where it lies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hybrimoe_plugin.errors import ConfigError, WeightsError
from lever_ext.flash.format import (
    ALIGNMENT,
    DTYPES,
    TENSOR_ALIGNMENT,
    Block,
    PackedTensor,
    align,
)

WIDE = "float32"
"""Stored type of what a model computes with in float32, whatever the type of the others."""
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
    dtype: str
    shape: tuple[int, ...]


def packed_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that a pack of a model holds, by qualified name: its parameters, and such buffers as
    files hold, like the corrections of routers. What is tied comes once.
    """
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}".removeprefix(".")] = value
    return found


def plan_blocks(model: nn.Module, dtype: str) -> list[Block]:
    """The blocks of a model's pack in the order of execution, without checksums.

    Args:
        model: on the meta device; names and shapes are all that is used.
        dtype: one of `DTYPES`, of all but buffers and what the model computes with in float32.

    Raises:
        ConfigError: unknown dtype.
        WeightsError: the model holds numbers that are no floating point.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    groups: dict[_Place, list[_Member]] = {}
    parameters = dict(model.named_parameters())
    wide = _computed_wide(model)
    for name, value in packed_tensors(model).items():
        if not value.is_floating_point():
            raise WeightsError(f"a pack holds floating point, and {name} is {value.dtype}")
        kind = WIDE if name not in parameters or wide.search(name) else dtype
        for place, member in _parts(_Member(name, kind, tuple(value.shape))):
            groups.setdefault(place, []).append(member)
    blocks = []
    offset = ALIGNMENT
    for place in sorted(groups):
        block = _block(place, offset, groups[place])
        blocks.append(block)
        offset += block.nbytes
    return blocks


def _computed_wide(model: Any) -> re.Pattern[str]:
    """Names of parameters that transformers keeps in float32 in a model of any type."""
    kept = [
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    parts = [rf"(^|\.){name}($|\.)" for name in kept]
    return re.compile("|".join(parts) or r"(?!)")


def _parts(tensor: _Member) -> list[tuple[_Place, _Member]]:
    """The blocks that a tensor lies in: one, or one for each expert of a stacked tensor."""
    name, dtype, shape = tensor
    layer = _layer_of(name)
    if layer < 0:
        stage = FIRST if "embed" in name else LAST
        return [(_Place(stage, -1, False, -1), tensor)]
    if ".experts." not in name:
        return [(_Place(IN_LAYERS, layer, False, -1), tensor)]
    member = _Member(name, dtype, shape[1:])
    return [(_Place(IN_LAYERS, layer, True, expert), member) for expert in range(shape[0])]


def _layer_of(name: str) -> int:
    """The decoder layer that a parameter's name belongs to, or -1."""
    parts = name.split(".")
    for part, following in zip(parts, parts[1:], strict=False):
        if part == "layers":
            return int(following)
    return -1


def _block(place: _Place, offset: int, members: Sequence[_Member]) -> Block:
    tensors = []
    inside = 0
    for name, dtype, shape in members:
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
