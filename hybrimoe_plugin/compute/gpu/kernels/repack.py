"""Rearrange GGML blocks into planes on arrival, at memory bandwidth (`layout.PLANES`)."""

# Triton's idiom: constants in capitals, arguments without Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


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
