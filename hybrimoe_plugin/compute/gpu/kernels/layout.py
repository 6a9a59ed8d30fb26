"""Where the parts of a quantised expert lie in its slot.

GGML keeps each block's codes and scales together. Blocks of 144 or 176 bytes (Q4_K, Q5_K) keep
their codes 16-byte aligned, so they stay as they are. Blocks of 18, 34 or 210 bytes (Q4_0, Q8_0,
Q6_K) would make every load unaligned: they are split into planes, one for each field over all
blocks of the matrix, which takes not a byte more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.core import ExpertSpec

ALIGNMENT = 256
"""Of every matrix in a slot and of the slots themselves."""

PLANES: dict[str, tuple[tuple[int, int], ...]] = {
    "Q4_0": ((2, 16), (0, 2)),
    "Q8_0": ((2, 32), (0, 2)),
    "Q6_K": ((0, 128), (128, 64), (192, 16), (208, 2)),
}
"""Type -> (offset in the block, bytes) of each plane, in slot order; every number is even and a
power of two or its double, so that the repacking kernel moves 16-bit words.
"""

BLOCK_BYTES = {"Q4_0": 18, "Q8_0": 34, "Q6_K": 210}


class Part(NamedTuple):
    """One matrix in a slot."""

    type_name: str
    rows: int
    columns: int
    offset: int
    """Bytes from the slot's start."""
    size: int
    """Stored bytes, the same before and after splitting."""
    split: bool
    """Whether its bytes are split into planes on arrival."""


class SlotLayout(NamedTuple):
    """Gate, up and down of one expert in a slot."""

    gate: Part
    up: Part
    down: Part

    @property
    def size(self) -> int:
        """Bytes of the slot."""
        return _aligned(self.down.offset + self.down.size)


def slot_layout(spec: ExpertSpec, split: bool) -> SlotLayout:
    """The layout of one layer's experts.

    Args:
        split: whether types in `PLANES` are split; the plain twin reads GGML blocks as they are.
    """
    offset = 0
    parts = []
    inner, outer = (spec.intermediate, spec.hidden), (spec.hidden, spec.intermediate)
    for type_name, size, (rows, columns) in (
        (spec.gate_type, spec.gate_bytes, inner),
        (spec.up_type, spec.up_bytes, inner),
        (spec.down_type, spec.down_bytes, outer),
    ):
        parts.append(Part(type_name, rows, columns, offset, size, split and type_name in PLANES))
        offset = _aligned(offset + size)
    return SlotLayout(*parts)


def split_planes(raw: NDArray[np.uint8], type_name: str) -> NDArray[np.uint8]:
    """A matrix's stored bytes in slot form; a copy. What the repacking kernel does on a device."""
    if type_name not in PLANES:
        return raw.copy()
    blocks = raw.reshape(-1, BLOCK_BYTES[type_name])
    return np.concatenate([blocks[:, at : at + count].ravel() for at, count in PLANES[type_name]])


def join_planes(planes: torch.Tensor, type_name: str) -> torch.Tensor:
    """The stored bytes [n] uint8 of a matrix in slot form."""
    if type_name not in PLANES:
        return planes
    count = planes.numel() // BLOCK_BYTES[type_name]
    blocks = torch.empty(count, BLOCK_BYTES[type_name], dtype=torch.uint8, device=planes.device)
    start = 0
    for at, size in PLANES[type_name]:
        blocks[:, at : at + size] = planes[start : start + count * size].view(count, size)
        start += count * size
    return blocks.flatten()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
