"""A kept sequence, and how much of one a prompt shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hybrimoe_plugin.compute.attention.kept_entries import can_be_cut
from hybrimoe_plugin.hosts.transformers.prefixes.layers import (
    HOST,
    bytes_of,
    copy_of,
    device_of,
    put_aside,
)

Ids = np.ndarray[Any, np.dtype[np.int64]]
"""Token ids [T]."""

Tokens = Sequence[int] | Ids
"""Token ids as callers have them."""


@dataclass(frozen=True, eq=False)
class Entry:
    """The KV cache of a sequence, in main memory.

    Attributes:
        ids: the tokens that it holds.
        layers: each layer's entries of them.
        devices: where each layer is computed.
    """

    ids: Ids
    layers: list[Any]
    devices: list[torch.device]

    @cached_property
    def can_be_cut(self) -> bool:
        """Whether a part of the tokens can be used too."""
        return all(map(can_be_cut, self.layers))

    @cached_property
    def nbytes(self) -> int:
        """Main memory that it takes."""
        return bytes_of(self.layers)


def entry_of(ids: Ids, layers: list[Any]) -> Entry:
    """Put a sequence aside whose caller is done with it.

    Args:
        ids: its tokens, all of which every layer holds.
        layers: of its cache. Mutates: each goes over as its memory on a device is given back.
    """
    devices = [device_of(layer) for layer in layers]
    for number, layer in enumerate(layers):
        layers[number] = put_aside(layer, len(ids))
    return Entry(ids, list(layers), devices)


def copied_entry(ids: Ids, layers: Sequence[Any]) -> Entry:
    """As `entry_of`, of a sequence that goes on."""
    copies = [put_aside(copy_of(layer, len(ids), HOST), len(ids)) for layer in layers]
    return Entry(ids, copies, [device_of(layer) for layer in layers])


def as_ids(tokens: Tokens) -> Ids:
    """Token ids as an array."""
    return np.asarray(tokens, dtype=np.int64)


def shared_part(held: Ids, wanted: Ids, least: int, in_part: bool) -> int:
    """How many tokens both begin with; 0 where they are no more than `least`.

    Args:
        held: tokens that are kept.
        wanted: tokens to go on behind.
        in_part: whether less than all that is held can be used.
    """
    most = min(len(held), len(wanted))
    if most <= least or (not in_part and most < len(held)):
        return 0
    # First the token that decides: nearly all sequences differ there, if not before.
    deciding = least if in_part else most - 1
    if held[deciding] != wanted[deciding]:
        return 0
    same = held[:most] == wanted[:most]
    count = most if same.all() else int(same.argmin())
    if count <= least or (not in_part and count < len(held)):
        return 0
    return count
