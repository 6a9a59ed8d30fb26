"""Where the parts of a quantised expert lie in its slot.

A slot holds one expert's three matrices, each at a multiple of 256 bytes:

    byte 0                    up.offset                 down.offset               layout.size
    | gate [I, H]      | free | up [I, H]        | free | down [H, I]      | free |

Where experts have biases, they follow as one matrix of one row: gate's I, up's I and down's H
values in float32.

GGML keeps each block's codes and scales together. Blocks of 144 or 176 bytes (Q4_K, Q5_K) have
16-byte aligned codes, so they stay as they are. Blocks of other sizes, such as 17, 18, 34 or 210
bytes (MXFP4, Q4_0, Q8_0, Q6_K), would make every load unaligned. So these are kept in *planes*, one
for each field over all blocks of the matrix, which takes not a byte more:

    stored, Q8_0:   | d0 codes0 | d1 codes1 | d2 codes2 | ...      34 bytes each
    in planes:      | codes0 | codes1 | codes2 | ... | d0 | d1 | d2 | ...
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.gpu.kernels.formats.description import FORMATS
from hybrimoe_plugin.core import SILU, Activation, ExpertSpec

ALIGNMENT = 256
"""Of every matrix in a slot and of the slots themselves."""

PLANES: dict[str, tuple[tuple[int, int], ...]] = {
    name: form.planes for name, form in FORMATS.items() if form.planar
}
"""Type -> (offset in the block, bytes) of each plane, in slot order.

Every number of bytes is a power of two: the repacking kernel asks for it.
"""

BLOCK_BYTES = {name: form.block_bytes for name, form in FORMATS.items() if form.planar}


class Part(NamedTuple):
    """One matrix in a slot."""

    type_name: str
    rows: int
    columns: int
    offset: int
    """Bytes from the slot's start."""
    size: int
    """Stored bytes; planes take as many."""
    planar: bool
    """Whether it is kept in planes, and so repacked on arrival."""

    @property
    def span(self) -> slice:
        """Its bytes in the slot."""
        return slice(self.offset, self.offset + self.size)


class SlotLayout(NamedTuple):
    """Gate, up and down of one expert in a slot, its biases and its activation."""

    gate: Part
    up: Part
    down: Part
    biases: Part | None = None
    activation: Activation = SILU

    @property
    def parts(self) -> tuple[Part, ...]:
        """What crosses the link, in the order of `LayerWeights.stored`."""
        matrices = (self.gate, self.up, self.down)
        return matrices if self.biases is None else (*matrices, self.biases)

    @property
    def size(self) -> int:
        """Bytes of the slot."""
        last = self.parts[-1]
        return _aligned(last.offset + last.size)

    @property
    def largest_planar(self) -> int:
        """Bytes of the largest matrix that is kept in planes; 0 where none is."""
        return max(part.size if part.planar else 0 for part in self.parts)


def slot_layout(spec: ExpertSpec, planar: bool) -> SlotLayout:
    """The layout of one layer's experts.

    Args:
        planar: whether types in `PLANES` are kept in planes; the reference kernels read GGML
            blocks as they are.
    """
    inner = (spec.intermediate, spec.hidden)
    outer = (spec.hidden, spec.intermediate)
    matrices = (
        (spec.gate_type, spec.gate_bytes, inner),
        (spec.up_type, spec.up_bytes, inner),
        (spec.down_type, spec.down_bytes, outer),
    )
    parts = []
    offset = 0
    for type_name, size, (rows, columns) in matrices:
        in_planes = planar and type_name in PLANES
        parts.append(Part(type_name, rows, columns, offset, size, in_planes))
        offset = _aligned(offset + size)
    gate, up, down = parts
    biases = None
    if spec.bias_bytes:
        width = 2 * spec.intermediate + spec.hidden
        biases = Part("F32", 1, width, offset, spec.bias_bytes, False)
    return SlotLayout(gate, up, down, biases, spec.activation)


def to_planes(raw: NDArray[np.uint8], type_name: str) -> NDArray[np.uint8]:
    """A copy of a matrix's stored bytes in slot form.

    The same as the repacking kernel does on a device.
    """
    if type_name not in PLANES:
        return raw.copy()
    blocks = raw.reshape(-1, BLOCK_BYTES[type_name])
    planes = []
    for at, size in PLANES[type_name]:
        plane = blocks[:, at : at + size]
        planes.append(plane.ravel())
    return np.concatenate(planes)


def from_planes(planes: torch.Tensor, type_name: str) -> torch.Tensor:
    """The stored bytes [n] uint8 of a matrix in slot form."""
    if type_name not in PLANES:
        return planes
    block_bytes = BLOCK_BYTES[type_name]
    count = planes.numel() // block_bytes
    blocks = torch.empty(count, block_bytes, dtype=torch.uint8, device=planes.device)
    start = 0
    for at, size in PLANES[type_name]:
        end = start + count * size
        blocks[:, at : at + size] = planes[start:end].view(count, size)
        start = end
    return blocks.flatten()


def _aligned(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT
