"""Rearrange GGML blocks into planes on arrival, at memory bandwidth (`layout.PLANES`)."""

# Triton's idiom: constants in capitals, arguments without Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from hybrimoe_plugin.compute.gpu.kernels.layout import BLOCK_BYTES, PLANES, Part

REPACKED_BLOCKS = 32
"""Blocks that one program moves."""


@triton.jit
def blocks_to_planes(
    source,
    target,
    blocks,
    BLOCK_WORDS: tl.constexpr,
    OFFSETS: tl.constexpr,
    WORDS: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    """Move each field of `blocks` blocks into its plane; grid (programs).

    Everything counts the words that source and target point to.

        PER_PROGRAM  blocks that one program moves
        OFFSETS      where each field begins in a block
        WORDS        how long each field is
    """
    block = (tl.program_id(0) * PER_PROGRAM + tl.arange(0, PER_PROGRAM))[:, None]
    start = 0
    for field in tl.static_range(len(WORDS)):
        word = tl.arange(0, WORDS[field])[None, :]
        inside = (block < blocks) & (word >= 0)
        read_at = source + block.to(tl.int64) * BLOCK_WORDS + OFFSETS[field] + word
        values = tl.load(read_at, inside)
        write_at = target + start + block.to(tl.int64) * WORDS[field] + word
        tl.store(write_at, values, inside)
        start += blocks * WORDS[field]


@triton.jit
def expert_to_planes(
    source_0,
    source_1,
    source_2,
    target,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    """Up to three matrices into one slot; grid (programs of the largest, matrices).

    Sources and target point to bytes. Each part is described as `part_shape` does; the grid leaves
    out those that are not there.
    """
    part = tl.program_id(1)
    if part == 0:
        _part_to_planes(source_0, target, PART_0, PER_PROGRAM)
    if part == 1:
        _part_to_planes(source_1, target, PART_1, PER_PROGRAM)
    if part == 2:
        _part_to_planes(source_2, target, PART_2, PER_PROGRAM)


@triton.jit
def _part_to_planes(source, target, PART: tl.constexpr, PER_PROGRAM: tl.constexpr):
    if len(PART) > 0:
        # Named, so that Triton takes them for constants in the call.
        word: tl.constexpr = tl.int16 if PART[0] == 2 else tl.uint8
        blocks: tl.constexpr = PART[2]
        block_words: tl.constexpr = PART[3]
        offsets: tl.constexpr = PART[4]
        words: tl.constexpr = PART[5]
        blocks_to_planes(
            source.to(tl.pointer_type(word)),
            (target + PART[1]).to(tl.pointer_type(word)),
            blocks,
            block_words,
            offsets,
            words,
            PER_PROGRAM,
        )


def part_shape(part: Part) -> tuple[Any, ...]:
    """A part as `blocks_to_planes` takes it.

    (bytes of a word, offset in the slot in bytes, blocks, words of a block, where each field
    begins, how long it is)
    """
    block_bytes = BLOCK_BYTES[part.type_name]
    word = 1 if block_bytes % 2 else 2
    planes = PLANES[part.type_name]
    offsets = tuple(offset // word for offset, _ in planes)
    words = tuple(size // word for _, size in planes)
    blocks = part.size // block_bytes
    return word, part.offset, blocks, block_bytes // word, offsets, words


class ExpertRepacker:
    """Launches `expert_to_planes` for experts of one layout (a `layer_path.Repacker`).

    The first launch compiles. Later ones skip what Triton does to find the compiled kernel again,
    which costs the host more than the launch.
    """

    def __init__(self, parts: tuple[Part, ...]) -> None:
        shapes = [part_shape(part) for part in parts]
        programs = max(triton.cdiv(shape[2], REPACKED_BLOCKS) for shape in shapes)
        self._grid = (programs, len(parts), 1)
        absent = 3 - len(parts)
        self._constants = (*shapes, *[()] * absent, REPACKED_BLOCKS)
        self._absent = absent
        self._run: Any = None
        """The compiled kernel, for addresses that are multiples of 16 as the first ones are."""

    def __call__(self, arrived: Sequence[torch.Tensor], slot: torch.Tensor, stream: int) -> None:
        memory = (*arrived, *[slot] * self._absent, slot)
        addresses = [tensor.data_ptr() for tensor in memory]
        aligned = all(address % 16 == 0 for address in addresses)
        if self._run is not None and aligned:
            self._run(*addresses, *self._constants, stream=stream)
            return
        if not stream:
            expert_to_planes[self._grid](*memory, *self._constants)
            return
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, slot.device)):
            compiled = expert_to_planes[self._grid](*memory, *self._constants)
        if aligned:
            self._run = compiled[self._grid]
