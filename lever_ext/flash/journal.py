"""Which blocks of an unfinished pack are safely on the disk, so that packing can be resumed."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lever_ext.flash.format import Block

log = logging.getLogger(__name__)


@dataclass
class Journal:
    """Checksums of the blocks that were written.

    A line with the plan's key, then a line for each block: its number, its CRC-32 and a CRC-32 of
    the line itself.

        5f0c...e1            sha256 of the plan
        0 1843215 912340     block 0
        1 77120944 33108     block 1
        2 401                cut off by a crash: not a record

    A crash may leave anything at the end of such a file, so it counts up to its last whole record,
    and no further than the blocks are what their checksums say.

    Args:
        path: the journal's file.
        key: what the pack depends on; the journal of another pack is not used.
    """

    path: Path
    key: str
    noted: int = 0
    """Blocks whose records are in it."""

    def open(self, partial: Path, blocks: Sequence[Block]) -> list[int]:
        """Checksums of the first blocks, which need not be written again.

        Args:
            partial: the unfinished pack.
            blocks: of the plan.

        Mutates: the journal, which ends with them; a partial pack without any is removed.
        """
        known = self._read(blocks)
        done = _sound(partial, blocks, known) if known and partial.exists() else []
        if len(done) < len(known):
            log.warning(
                "%s: %d of %d noted blocks are not as noted: written again",
                partial,
                len(known) - len(done),
                len(known),
            )
        if not done:
            partial.unlink(missing_ok=True)
        self._begin(done)
        return done

    def add(self, checksums: Sequence[int]) -> None:
        """Note that the next blocks, which have these checksums, are on the disk. Mutates."""
        self._write("a", checksums)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def is_begun(self) -> bool:
        """Whether an unfinished pack with this key is there."""
        return bool(self._lines())

    def _lines(self) -> list[bytes]:
        """The whole lines of this key's journal; none where there is another's, or none."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        # What follows the last line end was cut off.
        whole = data.split(b"\n")[:-1]
        if not whole or whole[0].decode(errors="replace") != self.key:
            return []
        return whole

    def _read(self, blocks: Sequence[Block]) -> list[int]:
        """The checksums of whole records, at most one for each block."""
        found: list[int] = []
        for number, line in enumerate(self._lines()[1:]):
            checksum = _checksum_in(line, number)
            if checksum is None:
                break
            found.append(checksum)
        return found[: len(blocks)]

    def _begin(self, done: Sequence[int]) -> None:
        # In a file of its own first: a crash here must leave the former journal or this one.
        new = self.path.with_name(self.path.name + ".new")
        Journal(new, self.key)._write("w", done)
        os.replace(new, self.path)
        sync_directory(self.path.parent)
        self.noted = len(done)

    def _write(self, mode: str, checksums: Sequence[int]) -> None:
        lines = [_record(number, crc) for number, crc in enumerate(checksums, self.noted)]
        if mode == "w":
            lines.insert(0, self.key)
        with open(self.path, mode, encoding="ascii") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        self.noted += len(checksums)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a crash."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _record(number: int, crc: int) -> str:
    text = f"{number} {crc}"
    return f"{text} {zlib.crc32(text.encode())}"


def _checksum_in(line: bytes, number: int) -> int | None:
    """The checksum in the record of a block; None if the line is anything else."""
    parts = line.split(b" ")
    if len(parts) != 3 or not parts[1].isdigit() or len(parts[1]) > 10:
        return None
    crc = int(parts[1])
    return crc if line.decode(errors="replace") == _record(number, crc) else None


def _sound(partial: Path, blocks: Sequence[Block], checksums: Sequence[int]) -> list[int]:
    """The first checksums whose blocks lie in the file as noted, up to the first that does not."""
    log.info("%s: checking %d blocks that an earlier run has written", partial, len(checksums))
    with open(partial, "rb") as file:
        for count, (block, crc) in enumerate(zip(blocks, checksums, strict=False)):
            file.seek(block.offset)
            data = file.read(block.nbytes)
            if len(data) < block.nbytes or zlib.crc32(data) != crc:
                return list(checksums[:count])
    return list(checksums)
