"""Write a flash pack: planned first, resumable, whole or not there at all."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrimoe_plugin.errors import FlashError, WeightsError
from lever_ext.flash.dtype_choice import (
    AUTO,
    NARROW,
    WIDE,
    DoesNotFitError,
    Narrowed,
    activations_fit,
    not_held,
)
from lever_ext.flash.finished import source_key
from lever_ext.flash.format import (
    ALIGNMENT,
    PACK_NAME,
    VERSION,
    Block,
    Index,
    PackedTensor,
    header_bytes,
)
from lever_ext.flash.journal import Journal, sync_directory
from lever_ext.flash.plan import plan_blocks
from lever_ext.flash.source import TensorSource

log = logging.getLogger(__name__)

SYNC_BYTES = 64 << 20
"""Bytes between two notes in the journal: what a killed pack may have to write again."""
INDEX_ROOM = 16 << 20
"""Space that is kept free for the index."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


def write_pack(
    source: TensorSource,
    model: nn.Module,
    config: dict[str, Any],
    directory: str | Path,
    dtype: str = AUTO,
    progress: Progress | None = None,
    replacing: Callable[[], None] | None = None,
) -> Path:
    """Write `directory/target.lever`; a former pack there stays whole until the new one is.

    Args:
        source: the weights.
        model: the same model on the meta device.
        config: its config, stored in the pack.
        directory: made if missing.
        dtype: stored type of all weights; auto is float16, or bfloat16 where that does not do.
        progress: told after every block.
        replacing: called once the pack is whole, right before it gets its name.

    Returns:
        the pack's path.

    Raises:
        FlashError: no space, or the disk failed; what was written is kept for a resumed run.
        WeightsError: a tensor is missing, has another shape than the model, or values that are
            not finite or not in the type's range; or the model holds numbers that are no floating
            point.
    """
    directory = Path(directory)
    write = functools.partial(
        _write, config=config, directory=directory, progress=progress, replacing=replacing
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlashError(
            f"{directory}: the folder cannot be made ({error.strerror or error})"
        ) from error
    try:
        if dtype != AUTO:
            return write(source, plan_blocks(model, dtype))
        wide = plan_blocks(model, WIDE)
        narrow = plan_blocks(model, NARROW)
        if _may_be_narrow(source, wide, config, directory):
            try:
                return write(Narrowed(source), narrow)
            except DoesNotFitError as found:
                log.warning("float16 does not hold this model: %s; packed in bfloat16", found)
        return write(source, wide, fell_back=True)
    except OSError as error:
        raise FlashError(
            f"{directory}: cannot write the pack ({error.strerror or error}); what is written is "
            f"kept, the same command goes on from there"
        ) from error


def _write(
    source: TensorSource,
    blocks: Sequence[Block],
    config: dict[str, Any],
    directory: Path,
    progress: Progress | None,
    replacing: Callable[[], None] | None,
    fell_back: bool = False,
) -> Path:
    """Write the planned blocks, then index and header; the pack's path.

    The header is written last, once everything else is on the disk, and the file gets its name
    after that: what has the name is a whole pack.
    """
    target = directory / PACK_NAME
    partial = directory / (PACK_NAME + ".partial")
    end = blocks[-1].offset + blocks[-1].nbytes
    journal = _journal(source, blocks, config, directory, fell_back)
    done = journal.open(partial, blocks)
    _check_space(directory, partial, end + INDEX_ROOM)
    with open(partial, "r+b" if partial.exists() else "w+b") as file:
        fd = file.fileno()
        os.posix_fallocate(fd, 0, end)
        finished = _write_blocks(fd, source, blocks, done, journal, progress)
        index = Index(config, tuple(finished), source_key(source, config)).to_bytes()
        os.pwrite(fd, index, end)
        os.ftruncate(fd, end + len(index))
        os.fsync(fd)
        os.pwrite(fd, header_bytes(end, index), 0)
        os.fsync(fd)
    if replacing is not None:
        replacing()
    os.replace(partial, target)
    sync_directory(directory)
    journal.remove()
    return target


def _write_blocks(
    fd: int,
    source: TensorSource,
    blocks: Sequence[Block],
    done: Sequence[int],
    journal: Journal,
    progress: Progress | None,
) -> list[Block]:
    """Write the blocks that are not there yet; all blocks with their checksums.

    Args:
        done: checksums of the first blocks, which are there.
    """
    total = sum(block.nbytes for block in blocks)
    finished = [
        dataclasses.replace(block, crc=crc) for block, crc in zip(blocks, done, strict=False)
    ]
    unsynced = 0
    noted = len(finished)
    for block in blocks[len(finished) :]:
        data = _block_bytes(source, block)
        _write_at(fd, data, block.offset)
        finished.append(dataclasses.replace(block, crc=zlib.crc32(data)))
        unsynced += block.nbytes
        if unsynced >= SYNC_BYTES:
            os.fdatasync(fd)
            journal.add([block.crc for block in finished[noted:]])
            unsynced = 0
            noted = len(finished)
        if progress is not None:
            progress(block.offset + block.nbytes - ALIGNMENT, total)
    return finished


def _write_at(fd: int, data: bytearray, offset: int) -> None:
    """Write all bytes, in as many calls as that takes."""
    left = memoryview(data)
    end = offset + len(data)
    while left:
        written = os.pwrite(fd, left, end - len(left))
        left = left[written:]


def _block_bytes(source: TensorSource, block: Block) -> bytearray:
    """The bytes of a block, as they lie in the pack."""
    data = bytearray(block.nbytes)
    memory = torch.frombuffer(data, dtype=torch.uint8)
    for tensor in block.tensors:
        value = _value(source, block, tensor)
        if tuple(value.shape) != tensor.shape:
            raise WeightsError(
                f"tensor {tensor.name!r} has shape {tuple(value.shape)}, the config asks for "
                f"{tensor.shape}"
            )
        part = memory[tensor.offset : tensor.offset + tensor.nbytes]
        stored = part.view(getattr(torch, tensor.dtype)).view(tensor.shape)
        stored.copy_(value)
        # No temporary of the tensor's size, and NaN is handed on.
        if not all(end.isfinite() for end in torch.aminmax(stored)):
            raise not_held(_label(block, tensor), value, tensor.dtype)
    return data


def _label(block: Block, tensor: PackedTensor) -> str:
    """A tensor's name in messages."""
    return tensor.name if block.expert < 0 else f"{tensor.name}[{block.expert}]"


def _value(source: TensorSource, block: Block, tensor: PackedTensor) -> torch.Tensor:
    if block.expert < 0:
        return source.get(tensor.name)
    return source.expert(tensor.name, block.expert)


def _may_be_narrow(
    source: TensorSource, wide: Sequence[Block], config: dict[str, Any], directory: Path
) -> bool:
    """Whether float16 is still to be tried: an interrupted run may have found that it won't do."""
    if not activations_fit(str(config.get("model_type", ""))):
        return False
    return not _journal(source, wide, config, directory, fell_back=True).is_begun()


def _journal(
    source: TensorSource,
    blocks: Sequence[Block],
    config: dict[str, Any],
    directory: Path,
    fell_back: bool,
) -> Journal:
    """The journal of a pack; its key is made from all that an unfinished one depends on."""
    plan = [dataclasses.asdict(block) for block in blocks]
    parts = [VERSION, source.identity, config, plan, *(["fell back"] if fell_back else [])]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Journal(directory / (PACK_NAME + ".journal"), key)


def _check_space(directory: Path, partial: Path, needed: int) -> None:
    """Raise FlashError where the pack does not fit, what is written of it already included."""
    held = partial.stat().st_blocks * 512 if partial.exists() else 0
    free = shutil.disk_usage(directory).free + held
    if free < needed:
        raise FlashError(
            f"{directory}: the pack needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are "
            f"free; nothing was written: free some space or choose another directory"
        )
