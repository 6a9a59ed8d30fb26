"""Write a flash pack: planned first, resumable, whole or not there at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.errors import ConfigError, FlashError, WeightsError
from lever_ext.flash.format import (
    ALIGNMENT,
    DTYPES,
    TENSOR_ALIGNMENT,
    VERSION,
    Block,
    Index,
    PackedTensor,
    align,
    header_bytes,
)
from lever_ext.flash.source import TensorSource

log = logging.getLogger(__name__)

PACK_NAME = "target.lever"
SYNC_BYTES = 64 << 20
"""Bytes between two notes in the journal: what a killed pack may have to write again."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


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
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    groups: dict[tuple[int, str, int], list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        layer = layer_of(name)
        if layer < 0:
            # Embeddings first, norm and head last: -1 and a large number sort them so.
            groups.setdefault((-1 if "embed" in name else 1 << 30, "resident", -1), []).append(
                (name, shape)
            )
        elif ".experts." in name:
            for expert in range(shape[0]):
                groups.setdefault((layer, "zexpert", expert), []).append((name, shape[1:]))
        else:
            groups.setdefault((layer, "layer", -1), []).append((name, shape))
    blocks, offset = [], ALIGNMENT
    for (layer, kind, expert), members in sorted(groups.items()):
        kind = kind.removeprefix("z")
        block = _block(kind, -1 if kind == "resident" else layer, expert, offset, members, dtype)
        blocks.append(block)
        offset += block.nbytes
    return blocks


def _refuse_buffers(model: nn.Module) -> None:
    """Raise WeightsError for weights that a model keeps as buffers: a pack holds parameters."""
    lost = [
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set
    ]
    if lost:
        raise WeightsError(
            f"a pack holds a model's parameters, and would lose {', '.join(lost[:4])} "
            f"({len(lost)} in all): "
            "such a model cannot be packed"
        )


def layer_of(name: str) -> int:
    """The decoder layer that a parameter's name belongs to, or -1."""
    parts = name.split(".")
    return next(
        (int(after) for part, after in zip(parts, parts[1:], strict=False) if part == "layers"), -1
    )


def _block(
    kind: str,
    layer: int,
    expert: int,
    offset: int,
    members: Sequence[tuple[str, tuple[int, ...]]],
    dtype: str,
) -> Block:
    tensors, inside = [], 0
    for name, shape in members:
        tensors.append(PackedTensor(name, dtype, shape, inside))
        inside = align(inside + tensors[-1].nbytes, TENSOR_ALIGNMENT)
    return Block(kind, layer, expert, offset, align(inside), 0, tuple(tensors))


def write_pack(
    source: TensorSource,
    model: nn.Module,
    config: dict[str, Any],
    directory: str | Path,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
) -> Path:
    """Write `directory/target.lever`; a former pack there stays whole until the new one is.

    Args:
        source: the weights.
        model: the same model on the meta device.
        config: its config, stored in the pack.
        directory: made if missing.
        dtype: stored type of all weights.
        progress: told after every block.

    Returns:
        the pack's path.

    Raises:
        FlashError: no space, or the disk failed; what was written is kept for a resumed run.
        WeightsError: a tensor is missing or has another shape than the model, or the model has
            weights that are no parameters.
    """
    directory = Path(directory)
    _refuse_buffers(model)
    blocks = plan_blocks(model, dtype)
    end = blocks[-1].offset + blocks[-1].nbytes
    target, partial = directory / PACK_NAME, directory / (PACK_NAME + ".partial")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlashError(
            f"{directory}: the folder cannot be made ({error.strerror or error})"
        ) from error
    try:
        journal = _Journal(directory / (PACK_NAME + ".journal"), _plan_key(source, config, blocks))
        done = journal.open(partial, blocks)
        _check_space(directory, partial, end + (16 << 20))
        with open(partial, "r+b" if partial.exists() else "w+b") as file:
            os.posix_fallocate(file.fileno(), 0, end)
            finished = _write_blocks(file.fileno(), source, blocks, done, journal, progress)
            index = Index(config, tuple(finished)).to_bytes()
            os.pwrite(file.fileno(), index, end)
            os.ftruncate(file.fileno(), end + len(index))
            os.fsync(file.fileno())
            os.pwrite(file.fileno(), header_bytes(end, index), 0)
            os.fsync(file.fileno())
        os.replace(partial, target)
        _sync_directory(directory)
        journal.remove()
    except OSError as error:
        raise FlashError(
            f"{directory}: cannot write the pack ({error.strerror or error}); what is written is "
            f"kept, "
            "the same command goes on from there"
        ) from error
    return target


def _write_blocks(
    fd: int,
    source: TensorSource,
    blocks: Sequence[Block],
    done: Sequence[int],
    journal: _Journal,
    progress: Progress | None,
) -> list[Block]:
    """Write what `done` (checksums of the first blocks) lacks; the blocks with their checksums."""
    total = sum(block.nbytes for block in blocks)
    finished = [
        dataclasses.replace(block, crc=crc) for block, crc in zip(blocks, done, strict=False)
    ]
    unsynced, noted = 0, len(finished)
    for block in blocks[len(finished) :]:
        data = _block_bytes(source, block)
        crc = zlib.crc32(data)
        view = memoryview(data)
        while view:
            view = view[os.pwrite(fd, view, block.offset + block.nbytes - len(view)) :]
        finished.append(dataclasses.replace(block, crc=crc))
        unsynced += block.nbytes
        if unsynced >= SYNC_BYTES:
            os.fdatasync(fd)
            journal.add([b.crc for b in finished[noted:]])
            unsynced, noted = 0, len(finished)
        if progress is not None:
            progress(block.offset + block.nbytes - ALIGNMENT, total)
    return finished


def _block_bytes(source: TensorSource, block: Block) -> bytearray:
    data = bytearray(block.nbytes)
    whole = torch.frombuffer(data, dtype=torch.uint8)
    for tensor in block.tensors:
        value = (
            source.get(tensor.name)
            if block.expert < 0
            else source.expert(tensor.name, block.expert)
        )
        if tuple(value.shape) != tensor.shape:
            raise WeightsError(
                f"tensor {tensor.name!r} has shape {tuple(value.shape)}, the config asks for "
                f"{tensor.shape}"
            )
        part = whole[tensor.offset : tensor.offset + tensor.nbytes]
        part.view(getattr(torch, tensor.dtype)).view(tensor.shape).copy_(value)
    return data


@dataclass
class _Journal:
    """Which blocks of an unfinished pack are safely on the disk.

    A line with the plan's key, then a line for each block: its number, its CRC-32 and a CRC-32 of
    the line itself. A crash may leave anything at the end of such a file, half a line for example,
    so it counts up to its last whole record, and no further than the blocks are what their
    checksums say.
    """

    path: Path
    key: str
    noted: int = 0
    """Blocks whose records are in it."""

    def open(self, partial: Path, blocks: Sequence[Block]) -> list[int]:
        """Checksums of the blocks that need not be written again. Mutates: the journal, which ends
        with them.
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

    def _read(self, blocks: Sequence[Block]) -> list[int]:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        start, *lines = data.split(b"\n")[:-1] or [
            b""
        ]  # what follows the last line end was cut off
        if start.decode(errors="replace") != self.key:
            return []
        found: list[int] = []
        for number, line in enumerate(lines):
            checksum = _checksum_in(line, number)
            if checksum is None:
                break
            found.append(checksum)
        return found[: len(blocks)]

    def _begin(self, done: Sequence[int]) -> None:
        # In a file of its own first: a crash here must leave the former journal or this one.
        new = self.path.with_name(self.path.name + ".new")
        _Journal(new, self.key)._write("w", done)
        os.replace(new, self.path)
        _sync_directory(self.path.parent)
        self.noted = len(done)

    def _write(self, mode: str, checksums: Sequence[int]) -> None:
        lines = [_record(number, crc) for number, crc in enumerate(checksums, self.noted)]
        with open(self.path, mode, encoding="ascii") as file:
            file.writelines(f"{line}\n" for line in ([self.key, *lines] if mode == "w" else lines))
            file.flush()
            os.fsync(file.fileno())
        self.noted += len(lines)


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


def _plan_key(source: TensorSource, config: dict[str, Any], blocks: Sequence[Block]) -> str:
    text = json.dumps(
        [VERSION, source.identity, config, [dataclasses.asdict(block) for block in blocks]],
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _check_space(directory: Path, partial: Path, needed: int) -> None:
    held = partial.stat().st_blocks * 512 if partial.exists() else 0
    free = shutil.disk_usage(directory).free
    if free + held < needed:
        raise FlashError(
            f"{directory}: the pack needs {needed / 2**20:.0f} MiB, {(free + held) / 2**20:.0f} "
            f"MiB are free; "
            "nothing was written: free some space or choose another directory"
        )


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
