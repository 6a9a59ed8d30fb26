"""Open GGUF weights, a single file or a split set, without reading them: bytes are mapped, checked
and shared.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from hybrimoe_plugin.device.memory import huge_pages
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.files import open_regular
from hybrimoe_plugin.weights import dequant
from hybrimoe_plugin.weights.gguf_header import TensorInfo, read_header

_READ_BYTES = 1 << 26
_AT_A_TIME = 1 << 20
"""Values that are dequantised at a time: what lies between stays in the processor's cache."""
_IN_USE = "the weights file was changed while it is in use; load the model again"
_SPLIT = re.compile(r"^(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$")


class _Identity(NamedTuple):
    """What changes when a file is written to, cut or replaced."""

    nbytes: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, found: os.stat_result) -> _Identity:
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


class GGUFStore:
    """Read-only view of GGUF weights.

    Files are mapped: kernels read them where they lie, and the system ends a process that reads
    where a mapped file has become shorter. So what is copied while a model loads is read into
    memory instead, and `check_unchanged` is called before each pass of a model. A file that is cut
    within a pass still ends the process, unless `read_into_memory` was called.

    Attributes:
        paths: the files, in order.
        metadata: key -> value of the first file.
        tensors: name -> `TensorInfo`, over all files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Use `open`."""
        self.paths = tuple(paths)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.kernels: object | None = None
        """Kernels that read these bytes where they lie; the first operator on the store sets them,
        all share them.
        """
        self._bytes: list[NDArray[np.uint8]] = []
        self._files: list[BinaryIO] = []
        self._mapped: dict[int, _Identity] = {}
        """By index of the file: as it was when it was opened; those read into memory are taken out.
        """
        weakref.finalize(self, _close_all, self._files)
        for index, path in enumerate(self.paths):
            file, data = _map(path)
            self._files.append(file)
            self._mapped[index] = _Identity.of(os.fstat(file.fileno()))
            metadata, tensors = read_header(data, str(path), index)
            if index == 0:
                self.metadata = metadata
            else:
                self._check_part(metadata, path)
            for info in tensors:
                if info.name in self.tensors:
                    raise WeightsError(
                        f"{path}: tensor {info.name!r} is in another part of the split set too"
                    )
                self.tensors[info.name] = info
            self._bytes.append(np.frombuffer(data, dtype=np.uint8))

    @classmethod
    def open(cls, path: str | Path | Sequence[str | Path]) -> GGUFStore:
        """Open a file, any part of a split set, a directory that holds one model, or a list of
        files.

        Raises:
            WeightsError: nothing there, several models, a part missing, or a file that is not sound
                GGUF.
        """
        if isinstance(path, str | Path):
            return cls(_resolve(Path(path)))
        return cls([Path(part) for part in path])

    @property
    def architecture(self) -> str:
        """`general.architecture`, e.g. `llama`.

        Raises:
            WeightsError: the file names none.
        """
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise WeightsError(f"{self.paths[0]}: no general.architecture in the GGUF metadata")
        return name

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(part.size for part in self._bytes)

    def read_into_memory(self) -> None:
        """Read the files into memory of the process's own, on huge pages where the system gives
        them.

        A mapped file lies on small pages, whose addresses the processor must look up all the time:
        reading experts in Q8_0 from huge pages is 1 to 14 % faster (docs/LOG.md). Call it before
        anything holds a view; the file's cached pages are left to the system, which may take them
        back.

        Raises:
            WeightsError: a file cannot be read any more.

        Mutates: the store.
        """
        for index in range(len(self.paths)):
            size = self._bytes[index].size
            memory = huge_pages(size)
            with memoryview(memory) as view:
                for start in range(0, size, _READ_BYTES):
                    self._read_into(index, start, view[start : start + _READ_BYTES])
            self._check(index)  # half old and half new would be neither
            values = np.frombuffer(memory, dtype=np.uint8)
            values.flags.writeable = False
            self._bytes[index] = values
            del self._mapped[index]

    def info(self, name: str) -> TensorInfo:
        """Raises: WeightsError: no such tensor."""
        if name not in self.tensors:
            raise WeightsError(f"{self.paths[0]}: tensor {name!r} is missing")
        return self.tensors[name]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's stored bytes, 1-D uint8, read-only and not copied. Valid until `close`."""
        info = self.info(name)
        return self._bytes[info.file][info.offset : info.offset + info.nbytes]

    def read(self, name: str) -> NDArray[np.uint8]:
        """A copy of the tensor's stored bytes, 1-D uint8. Raises: WeightsError: missing, or the
        file was cut.
        """
        info = self.info(name)
        return self._part(info, 0, info.nbytes)

    def check_unchanged(self) -> None:
        """See whether mapped files are as they were when they were opened; takes microseconds.

        Raises:
            WeightsError: one was written to, cut, replaced or removed.
        """
        for index in self._mapped:
            self._check(index)

    @property
    def others_may_write(self) -> bool:
        """Whether any user of the system may write to, and so cut, a file that is mapped."""
        return any(
            os.fstat(self._files[index].fileno()).st_mode & stat.S_IWOTH for index in self._mapped
        )

    def _check_part(self, metadata: dict[str, Any], path: Path) -> None:
        """Raise WeightsError where a part of a split set states what the first one does not: only
        that one is read.
        """
        for key, value in metadata.items():
            if not key.startswith(("general.", "split.")) and self.metadata.get(key) != value:
                raise WeightsError(
                    f"{path}: this part of the split set states {key}, and the first part does not"
                )

    def _check(self, index: int) -> None:
        path = self.paths[index]
        try:
            found = _Identity.of(os.stat(path))
        except OSError as error:
            raise WeightsError(f"{path}: {_IN_USE} ({error.strerror or error})") from None
        before = self._mapped[index]
        if found != before:
            what = "replaced by another file"
            if (found.inode, found.device) == (before.inode, before.device):
                what = f"it has {found.nbytes} bytes and had {before.nbytes}"
                what = what if found.nbytes != before.nbytes else "written to"
            raise WeightsError(f"{path}: {_IN_USE} ({what})")

    def _part(self, info: TensorInfo, start: int, nbytes: int) -> NDArray[np.uint8]:
        """A copy of a part of a tensor's bytes."""
        begin = info.offset + start
        if info.file not in self._mapped:
            return self._bytes[info.file][begin : begin + nbytes].copy()
        found = np.empty(nbytes, np.uint8)
        self._read_into(info.file, begin, memoryview(found))
        return found

    def _read_into(self, index: int, start: int, view: memoryview) -> None:
        """Fill `view` from a file. Raises: WeightsError."""
        path, done = self.paths[index], 0
        try:
            while done < len(view):
                count = os.preadv(self._files[index].fileno(), [view[done:]], start + done)
                if not count:
                    raise WeightsError(f"{path}: {_IN_USE} (it has become shorter)")
                done += count
        except OSError as error:
            raise WeightsError(
                f"{path}: cannot read the weights ({error.strerror or error})"
            ) from None

    def dequantized(
        self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """A fresh tensor of the stored shape: `gguf.quants.dequantize` to the last bit, rounded to
        `dtype`.

        Args:
            device: where the tensor will be. The stored bytes go there and are dequantised there, a
                part at a time.

        Raises:
            WeightsError: missing, or of a type that `gguf` cannot dequantise.
        """
        info = self.info(name)
        if info.type_name not in dequant.supported():
            return dequantize_bytes(self.read(name), info.type_name, info.shape, name).to(
                device, dtype
            )
        values = torch.empty(info.shape, dtype=dtype, device=device)
        flat, done = values.view(-1), 0
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[info.type_name]]
        step = _AT_A_TIME // block * block_bytes
        with _one_thread():
            for first in range(0, info.nbytes, step):
                part = self._part(info, first, min(step, info.nbytes - first))
                stored = torch.from_numpy(part).to(device)
                count = stored.numel() // block_bytes * block
                flat[done : done + count] = dequant.dequantize(stored, info.type_name, (count,))
                done += count
        return values

    def close(self) -> None:
        """Drop the mappings; they are unmapped once no view of them is left."""
        self._bytes.clear()
        self._mapped.clear()
        _close_all(self._files)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small operations in a row on one thread: a team of threads that wait for one another is
    slower, and where other processes want the cores several times so. One thread takes half as long
    as `gguf` for Q4_K and Q6_K.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dequantize_bytes(
    raw: NDArray[np.uint8], type_name: str, shape: Sequence[int], name: str = "tensor"
) -> torch.Tensor:
    """Float32 tensor of `shape` from GGML bytes.

    Raises:
        WeightsError: the type cannot be dequantised.
    """
    rows = raw.reshape(-1, raw.size * shape[-1] // int(np.prod(shape)))
    try:
        values = dequantize(rows, GGMLQuantizationType[type_name])
    except NotImplementedError:
        raise WeightsError(
            f"tensor {name!r}: GGML type {type_name} cannot be dequantised"
        ) from None
    # A float32 tensor comes back as a view of the mapping: read-only memory must not reach torch.
    values = np.require(values, dtype=np.float32, requirements=["C", "W"])
    return torch.from_numpy(values).reshape(tuple(shape))


def _close_all(files: Sequence[BinaryIO]) -> None:
    for file in files:
        file.close()


def _map(path: Path) -> tuple[BinaryIO, mmap.mmap]:
    try:
        file = open_regular(path)
        try:
            return file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except BaseException:
            file.close()
            raise
    except ValueError:  # mmap refuses an empty file
        raise WeightsError(f"{path}: the file is empty") from None
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot open the weights file ({error.strerror or error})"
        ) from None


def _resolve(path: Path) -> list[Path]:
    """All files of the model that `path` names."""
    if path.is_dir():
        # macOS keeps what other file systems cannot store in files of this name beside each one.
        files = sorted(file for file in path.glob("*.gguf") if not file.name.startswith("._"))
        if not files:
            raise WeightsError(f"{path}: no .gguf file in this directory")
        models = {
            match["stem"] if (match := _SPLIT.match(file.name)) else file.name for file in files
        }
        if len(models) > 1:
            raise WeightsError(
                f"{path}: holds several models ({', '.join(sorted(models))}): name one file"
            )
        path = files[0]
    match = _SPLIT.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [
        path.with_name(f"{match['stem']}-{part:05d}-of-{count:05d}.gguf")
        for part in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.exists()]
    if missing or count == 0:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightsError(
            f"{path}: the split set lacks {', '.join(missing[:3]) or 'all parts'}{more}"
        )
    return parts
