"""Write a flash pack: planned first, resumable, whole or not there at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
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
    Block,
    Index,
    PackedTensor,
    align,
    header_bytes,
)
from lever_ext.flash.source import TensorSource

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
            groups.setdefault((-1 if "embed" in name else 1 << 30, "resident", -1), []).append((name, shape))
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


def layer_of(name: str) -> int:
    """The decoder layer that a parameter's name belongs to, or -1."""
    parts = name.split(".")
    return next((int(after) for part, after in zip(parts, parts[1:], strict=False) if part == "layers"), -1)


def _block(
    kind: str, layer: int, expert: int, offset: int, members: Sequence[tuple[str, tuple[int, ...]]], dtype: str
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
        WeightsError: a tensor is missing or has another shape than the model.
    """
    directory = Path(directory)
    blocks = plan_blocks(model, dtype)
    end = blocks[-1].offset + blocks[-1].nbytes
    target, partial = directory / PACK_NAME, directory / (PACK_NAME + ".partial")
    try:
        directory.mkdir(parents=True, exist_ok=True)
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
            f"{directory}: cannot write the pack ({error.strerror or error}); what is written is kept, "
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
    finished = [dataclasses.replace(block, crc=crc) for block, crc in zip(blocks, done, strict=False)]
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
        value = source.get(tensor.name) if block.expert < 0 else source.expert(tensor.name, block.expert)
        if tuple(value.shape) != tensor.shape:
            raise WeightsError(
                f"tensor {tensor.name!r} has shape {tuple(value.shape)}, the config asks for {tensor.shape}"
            )
        part = whole[tensor.offset : tensor.offset + tensor.nbytes]
        part.view(getattr(torch, tensor.dtype)).view(tensor.shape).copy_(value)
    return data


@dataclass
class _Journal:
    """Which blocks of an unfinished pack are safely on the disk: their checksums, one a line."""

    path: Path
    key: str

    def open(self, partial: Path, blocks: Sequence[Block]) -> list[int]:
        """Checksums of the blocks that need not be written again; starts a new journal if it does not fit."""
        done = self._read(blocks)
        if done and partial.exists() and _sound(partial, blocks[len(done) - 1], done[-1]):
            return done
        partial.unlink(missing_ok=True)
        self.path.write_text(self.key + "\n")
        return []

    def _read(self, blocks: Sequence[Block]) -> list[int]:
        try:
            # A line without its end was cut off by a crash.
            lines = self.path.read_text().split("\n")[:-1]
            return [int(line) for line in lines[1:]][: len(blocks)] if lines and lines[0] == self.key else []
        except (OSError, ValueError):
            return []

    def add(self, checksums: Sequence[int]) -> None:
        with open(self.path, "a") as file:
            file.write("".join(f"{crc}\n" for crc in checksums))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _sound(partial: Path, block: Block, crc: int) -> bool:
    with open(partial, "rb") as file:
        file.seek(block.offset)
        return zlib.crc32(file.read(block.nbytes)) == crc


def _plan_key(source: TensorSource, config: dict[str, Any], blocks: Sequence[Block]) -> str:
    text = json.dumps([source.identity, config, [dataclasses.asdict(block) for block in blocks]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_space(directory: Path, partial: Path, needed: int) -> None:
    held = partial.stat().st_blocks * 512 if partial.exists() else 0
    free = shutil.disk_usage(directory).free
    if free + held < needed:
        raise FlashError(
            f"{directory}: the pack needs {needed / 2**20:.0f} MiB, {(free + held) / 2**20:.0f} MiB are free; "
            "nothing was written: free some space or choose another directory"
        )


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
