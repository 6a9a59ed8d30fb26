"""An open flash pack: its index, and the blocks that operators ask for."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from hybrimoe_plugin.errors import FlashError
from lever_ext.flash.format import (
    ALIGNMENT,
    PACK_NAME,
    Block,
    Index,
    align,
    parse_header,
    parse_index,
)
from lever_ext.flash.reader import Buffer, FlashReader, Throttle

Tensors = dict[str, torch.Tensor]


class FlashPack:
    """A target's weights on flash; opened by `open`.

    Attributes:
        index: config and blocks.
        reader: reads them.
    """

    def __init__(self, path: Path, index: Index, reader: FlashReader) -> None:
        self.path = path
        self.index = index
        self.reader = reader
        self._checked: set[int] = set()
        """Offsets of blocks whose checksum was right."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        threads: int = 4,
        chunk_bytes: int = 2 << 20,
        throttle: Throttle | None = None,
        direct: bool = True,
    ) -> FlashPack:
        """Open a pack, or a directory that holds one, and check its index.

        Raises:
            FlashError: nothing there, not a pack, of another version, damaged or truncated.
        """
        path = Path(path)
        path = path / PACK_NAME if path.is_dir() else path
        reader = FlashReader(path, threads, chunk_bytes, throttle, direct)
        try:
            with open(path, "rb") as file:
                offset, nbytes, crc = parse_header(file.read(ALIGNMENT), reader.size, str(path))
                file.seek(offset)
                index = parse_index(file.read(nbytes), crc, offset, str(path))
        except BaseException:
            reader.close()
            raise
        return cls(path, index, reader)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.index.config

    def blocks(self, kind: str) -> list[Block]:
        """The blocks of a kind, in the order of execution."""
        return [block for block in self.index.blocks if block.kind == kind]

    def check_holds(self, parameters: Iterable[str]) -> None:
        """Compare the pack's tensors with a model's parameters.

        Raises:
            FlashError: one that the other side does not have.
        """
        expected = dict.fromkeys(parameters)
        held = {tensor.name: None for block in self.index.blocks for tensor in block.tensors}
        missing = [name for name in expected if name not in held]
        unused = [name for name in held if name not in expected]
        if not missing and not unused:
            return
        if missing:
            what = f"lacks {missing[0]!r}"
        else:
            what = f"holds {unused[0]!r}, which the model has no place for"
        raise FlashError(
            f"{self.path}: the pack {what} ({len(missing) + len(unused)} such tensors); it was "
            f"made from another model"
        )

    def submit(self, block: Block, buffer: Buffer) -> Future[None]:
        """Start reading a block into a buffer that is large enough."""
        return self.reader.submit(block.offset, block.nbytes, buffer)

    def arrive(self, block: Block, buffer: Buffer, arrival: Future[None]) -> None:
        """Wait for a block that was submitted; its bytes are still to be checked.

        A read ahead may have failed long ago, in an answer that is over. It is tried once more:
        what counts is whether the block can be read now.

        Raises:
            FlashError: it cannot be read.
        """
        try:
            arrival.result()
        except FlashError:
            self.submit(block, buffer).result()

    def check(self, block: Block, buffer: Buffer) -> None:
        """Compare a block's bytes with its checksum.

        Done the first time that it is read, and again after any change of the file.

        Raises:
            FlashError: the block is damaged, or the file was written to since it was opened.
        """
        if not self.reader.check_unchanged():
            self._checked.clear()
        if block.offset in self._checked:
            return
        if zlib.crc32(buffer.memory[: block.nbytes]) != block.crc:
            raise FlashError(
                f"{self.path}: block {block.label} is damaged; pack the model again, with --force"
            )
        self._checked.add(block.offset)

    def load(self, block: Block) -> Tensors:
        """Read a block into memory of its own that lives as long as the tensors.

        Raises:
            FlashError: unreadable or damaged.
        """
        return tensors_in(block, self.read(block))

    def read(self, block: Block) -> Buffer:
        """A buffer of its own with a block's bytes.

        Raises:
            FlashError: unreadable or damaged.
        """
        buffer = Buffer(block.nbytes)
        self.submit(block, buffer).result()
        self.check(block, buffer)
        return buffer

    def close(self) -> None:
        self.reader.close()


def tensors_in(block: Block, buffer: Buffer) -> Tensors:
    """A block's tensors as views into a buffer. Valid until the buffer is read into again."""
    return views(block, buffer.bytes)


def views(block: Block, memory: torch.Tensor) -> Tensors:
    """A block's tensors as views into its bytes (uint8, any device)."""
    found = {}
    for tensor in block.tensors:
        part = memory[tensor.offset : tensor.offset + tensor.nbytes]
        found[tensor.name] = part.view(getattr(torch, tensor.dtype)).view(tensor.shape)
    return found


def block_memory(blocks: list[Block]) -> int:
    """Bytes of the largest block's buffer; 0 without blocks."""
    return max((align(block.nbytes) for block in blocks), default=0)
