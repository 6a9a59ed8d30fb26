"""Write a converted file a tensor at a time, so that an interrupted run goes on where it was."""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from hashlib import sha256
from io import BufferedRandom
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from hybrimoe_plugin.errors import BudgetError, ConfigError, WeightsError
from hybrimoe_plugin.files import human
from hybrimoe_plugin.hosts.transformers.complete import check_complete
from hybrimoe_plugin.hosts.transformers.config import model_config
from hybrimoe_plugin.hosts.transformers.convert.pieces import Written
from hybrimoe_plugin.hosts.transformers.convert.plan import Plan, plan
from hybrimoe_plugin.hosts.transformers.gguf_export import add_value
from hybrimoe_plugin.weights.gguf_store import GGUFStore

_READ_BYTES = 1 << 24
_RESERVE = 1 << 26
"""Bytes that stay free on the disk."""

Advance = Callable[[int], object]
"""Called with the number of bytes that are done."""


def convert(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    fp8: str = "Q8_0",
    progress: Callable[[int], contextlib.AbstractContextManager[Advance]] | None = None,
) -> Path:
    """Write a quantised checkpoint as one GGUF file, in the GGML types nearest to its own.

    What is written is kept when the call is interrupted: the same call goes on there. The file gets
    its name when it is whole.

    Args:
        directory: of the model, with config.json.
        output: default `model.gguf` in the directory.
        fp8: GGML type for FP8: Q8_0 or BF16.
        progress: from the number of bytes, a context with what is called as they are done.

    Returns:
        The file.

    Raises:
        WeightsError: the checkpoint is not sound, of a method or a form that is not read, or was
            changed meanwhile.
        ConfigError: no known family, or the file exists.
        BudgetError: no room on the disk.
    """
    path = Path(directory, "model.gguf") if output is None else Path(output)
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists and is not replaced: remove it, or name another file")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no directory {path.parent}")
    planned = plan(directory, fp8)
    part = path.with_name(f"{path.name}.part")
    try:
        _write(planned, Path(directory), part, progress or _unseen)
        os.replace(part, path)
        _journal(part).unlink()
    except OSError as error:
        raise WeightsError(f"{part}: cannot be written ({error.strerror or error})") from error
    return path


@contextlib.contextmanager
def _unseen(_total: int) -> Iterator[Advance]:
    yield lambda _count: None


def _write(
    planned: Plan,
    directory: Path,
    part: Path,
    progress: Callable[[int], contextlib.AbstractContextManager[Advance]],
) -> None:
    header = _header(planned, part)
    offsets, total = _offsets(planned.tensors, len(header))
    identity = _identity(planned, header)
    done = _done(part, identity)
    if done is None:
        _check_disk(part, total)
        _begin(part, header, total, identity)
        done = []
    _check_readable(planned, directory, part)
    with part.open("r+b") as file, _journal(part).open("ab", buffering=0) as journal:
        nbytes = sum(tensor.nbytes for tensor in planned.tensors)
        with progress(nbytes) as advance:
            kept = _still_right(file, planned.tensors, offsets, done, advance)
            # Also drops what a crash left of a line.
            journal.truncate(0)
            journal.write("".join([f"{identity}\n", *map(_line, done[:kept])]).encode())
            for tensor, offset in list(zip(planned.tensors, offsets, strict=True))[kept:]:
                file.seek(offset)
                check = _write_tensor(file, tensor, advance)
                file.flush()
                planned.store.check_unchanged()
                journal.write(_line(check).encode())
        os.fsync(file.fileno())


def _write_tensor(file: BufferedRandom, tensor: Written, advance: Advance) -> int:
    """Write one tensor's bytes and give their checksum."""
    check = written = 0
    for piece in tensor.pieces:
        for rows in piece.parts():
            data = np.ascontiguousarray(rows).reshape(-1).data
            file.write(data)
            check = zlib.crc32(data, check)
            written += len(data)
            advance(len(data))
    if written != tensor.nbytes:
        raise WeightsError(f"{tensor.name!r} takes {tensor.nbytes} bytes, and {written} were made")
    return check


def _header(planned: Plan, part: Path) -> bytes:
    """All that comes before the tensors' bytes."""
    scratch = part.with_name(f"{part.name}.header")
    try:
        writer = GGUFWriter(str(scratch), planned.architecture)
        for key, value in planned.metadata.items():
            add_value(writer, key, value)
        for tensor in planned.tensors:
            kind = GGMLQuantizationType[tensor.type_name]
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        found = scratch.read_bytes()
    finally:
        scratch.unlink(missing_ok=True)
    return found + bytes(-len(found) % GGUF_DEFAULT_ALIGNMENT)


def _offsets(tensors: tuple[Written, ...], start: int) -> tuple[list[int], int]:
    """Where each tensor begins, and the size of the file."""
    found = []
    for tensor in tensors:
        found.append(start)
        start += tensor.nbytes + -tensor.nbytes % GGUF_DEFAULT_ALIGNMENT
    return found, start


def _identity(planned: Plan, header: bytes) -> str:
    """What tells this conversion from others: the files it reads and what it writes."""
    digest = sha256(header)
    for path in planned.store.paths:
        found = path.stat()
        digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _journal(part: Path) -> Path:
    return part.with_name(f"{part.name}.done")


def _line(check: int) -> str:
    return f"{check:08x}\n"


def _done(part: Path, identity: str) -> list[int] | None:
    """Checksums of the tensors that an interrupted run has written; None to begin anew."""
    try:
        lines = _journal(part).read_text("ascii").split("\n")
        if lines[0] != identity or not part.is_file():
            return None
        return [int(line, 16) for line in lines[1:-1]]
    except (OSError, ValueError):
        return None


def _still_right(
    file: BufferedRandom,
    tensors: tuple[Written, ...],
    offsets: list[int],
    done: list[int],
    advance: Advance,
) -> int:
    """How many of the tensors that are said to be written have these checksums."""
    for number, (tensor, offset, wanted) in enumerate(zip(tensors, offsets, done, strict=False)):
        file.seek(offset)
        check, left = 0, tensor.nbytes
        while left:
            data = file.read(min(left, _READ_BYTES))
            if not data:
                break
            check = zlib.crc32(data, check)
            left -= len(data)
        if left or check != wanted:
            return number
        advance(tensor.nbytes)
    return min(len(done), len(tensors))


def _check_disk(part: Path, total: int) -> None:
    free = shutil.disk_usage(part.parent).free
    with contextlib.suppress(OSError):  # what is left of another conversion is replaced
        free += part.stat().st_blocks * 512
    if total + _RESERVE > free:
        raise BudgetError(
            f"{part.parent}: the file takes {human(total)}, and {human(free)} are free: name a "
            "file on another disk"
        )


def _begin(part: Path, header: bytes, total: int, identity: str) -> None:
    """Lay the file out, with holes for the tensors."""
    _journal(part).unlink(missing_ok=True)
    with part.open("wb") as file:
        file.write(header)
        file.truncate(total)
    _journal(part).write_text(f"{identity}\n", "ascii")


def _check_readable(planned: Plan, directory: Path, part: Path) -> None:
    """Read the file's header back, so that a file that could not be loaded costs no hours."""
    store = GGUFStore.open([part])
    try:
        config = model_config(directory, store)
        check_complete(planned.model, store, config)
    finally:
        store.close()
