"""Open GGUF weights, a single file or a split set: bytes are mapped, checked and shared."""

from __future__ import annotations

import itertools
import mmap
import os
import stat
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from hybrimoe_plugin.device.memory import huge_pages
from hybrimoe_plugin.device.torch_threads import one_thread
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights import dequant
from hybrimoe_plugin.weights.gguf_files import (
    FileIdentity,
    close_files,
    map_file,
    model_files,
    read_into,
)
from hybrimoe_plugin.weights.gguf_header import TensorInfo, read_header

_READ_BYTES = 1 << 26
_READERS = 2
"""Threads that read a file into memory. Two take half the time of one, which is spent on making
pages and copying, or on waiting for the disk (docs/LOG.md).
"""
_VALUES_AT_A_TIME = 1 << 20
"""Values that are dequantised at a time: intermediate results stay in the processor's cache."""

T = TypeVar("T")


class GGUFStore:
    """Read-only view of GGUF weights.

    Files are mapped, and kernels read them in place. If a mapped file becomes shorter, the system
    ends a process that reads beyond its new end. So what is copied while a model loads is read
    into memory instead, and `check_unchanged` is called before each pass of a model. A file that
    is cut within a pass still ends the process, unless `read_into_memory` was called.

    Attributes:
        paths: the files, in order.
        metadata: key -> value of the first file.
        tensors: name -> `TensorInfo`, over all files.
        directory: of the transformers model whose own files these are; None for GGUF files.
    """

    directory: Path | None = None

    def __init__(self, paths: Sequence[Path]) -> None:
        """Use `open`."""
        self.paths = tuple(paths)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._bytes: list[NDArray[np.uint8]] = []
        self._files: list[BinaryIO] = []
        self._mapped: dict[int, FileIdentity] = {}
        """Index of each mapped file -> its identity when it was opened."""
        self._companions: dict[Callable[[], Any], Any] = {}
        weakref.finalize(self, close_files, self._files)
        for index, path in enumerate(self.paths):
            self._add_file(index, path)

    @classmethod
    def open(cls, path: str | Path | Sequence[str | Path]) -> GGUFStore:
        """Open a file, any part of a split set, a directory that holds one model, or several files.

        Raises:
            WeightsError: nothing there, several models, a part missing, or a file that is not
                sound GGUF.
        """
        if isinstance(path, str | Path):
            return cls(model_files(Path(path)))
        return cls([Path(part) for part in path])

    def _add_file(self, index: int, path: Path) -> None:
        """Map one file and check its header. Raises: WeightsError."""
        file, data = map_file(path)
        self._files.append(file)
        self._mapped[index] = FileIdentity.of(os.fstat(file.fileno()))
        metadata, tensors = self._header(data, path, index)
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

    def _header(
        self, data: mmap.mmap, path: Path, index: int
    ) -> tuple[dict[str, Any], list[TensorInfo]]:
        """Metadata and tensors of one file. Raises: WeightsError."""
        return read_header(data, str(path), index)

    def _check_part(self, metadata: dict[str, Any], path: Path) -> None:
        """Raise WeightsError where a part of a split set states what the first one does not.

        Only the first part's metadata is used.
        """
        for key, value in metadata.items():
            about_the_part = key.startswith(("general.", "split."))
            if not about_the_part and self.metadata.get(key) != value:
                raise WeightsError(
                    f"{path}: this part of the split set states {key}, and the first part does not"
                )

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

    @property
    def in_memory(self) -> bool:
        """Whether all files were read into memory, and none is mapped."""
        return not self._mapped

    def companion(self, make: Callable[[], T]) -> T:
        """The store's one object that a class or a function makes, made when first asked for.

        For what all readers of the store share, such as the kernels that read its bytes in place.
        """
        if make not in self._companions:
            self._companions[make] = make()
        return cast(T, self._companions[make])

    def read_into_memory(self) -> None:
        """Replace the mappings by copies in memory, on huge pages where the system gives them.

        A mapped file lies on small pages, whose addresses the processor must look up all the time:
        reading experts in Q8_0 from huge pages is 1 to 14 % faster (docs/LOG.md). Call it before
        anything holds a view. The file's cached pages are left to the system to reclaim.

        Raises:
            WeightsError: a file cannot be read any more.

        Mutates: the store.
        """
        for index in range(len(self.paths)):
            size = self._bytes[index].size
            memory = huge_pages(size)
            with memoryview(memory) as view:
                self._read_whole(index, view)
            self._check(index)  # a change while reading would leave a mix of old and new
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

    def adjacent(self, names: Sequence[str]) -> NDArray[np.uint8] | None:
        """The bytes of several tensors as one view, as `raw`; None unless one follows the other."""
        infos = [self.info(name) for name in names]
        for one, other in itertools.pairwise(infos):
            if one.file != other.file or one.offset + one.nbytes != other.offset:
                return None
        first, last = infos[0], infos[-1]
        return self._bytes[first.file][first.offset : last.offset + last.nbytes]

    def read(self, name: str) -> NDArray[np.uint8]:
        """A copy of the tensor's stored bytes, 1-D uint8.

        Raises:
            WeightsError: the tensor is missing, or the file was cut.
        """
        info = self.info(name)
        return self._copied(info, 0, info.nbytes)

    def check_unchanged(self) -> None:
        """Check that mapped files are as they were when they were opened; takes microseconds.

        Raises:
            WeightsError: one was written to, cut, replaced or removed.
        """
        for index in self._mapped:
            self._check(index)

    @property
    def others_may_write(self) -> bool:
        """Whether any user of the system may write to, and so cut, a file that is mapped."""
        for index in self._mapped:
            mode = os.fstat(self._files[index].fileno()).st_mode
            if mode & stat.S_IWOTH:
                return True
        return False

    def dequantized(
        self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """A fresh tensor of the stored shape, rounded to `dtype`.

        Before rounding it equals `gguf.quants.dequantize` to the last bit.

        Args:
            device: where the tensor will be. The stored bytes go there and are dequantised there,
                a part at a time.

        Raises:
            WeightsError: missing, or of a type that `gguf` cannot dequantise.
        """
        info = self.info(name)
        if info.type_name not in dequant.supported():
            whole = dequantize_bytes(self.read(name), info.type_name, info.shape, name)
            return whole.to(device, dtype)
        values = torch.empty(info.shape, dtype=dtype, device=device)
        flat = values.view(-1)
        done = 0
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[info.type_name]]
        step = _VALUES_AT_A_TIME // block * block_bytes
        with one_thread():
            for first in range(0, info.nbytes, step):
                part = self._copied(info, first, min(step, info.nbytes - first))
                stored = torch.from_numpy(part).to(device)
                count = stored.numel() // block_bytes * block
                flat[done : done + count] = dequant.dequantize(stored, info.type_name, (count,))
                done += count
        return values

    def close(self) -> None:
        """Drop the mappings; they are unmapped once no view of them is left."""
        self._bytes.clear()
        self._mapped.clear()
        close_files(self._files)

    def _check(self, index: int) -> None:
        self._mapped[index].check(self.paths[index])

    def _copied(self, info: TensorInfo, start: int, nbytes: int) -> NDArray[np.uint8]:
        """A copy of a part of a tensor's bytes. Raises: WeightsError."""
        begin = info.offset + start
        if info.file not in self._mapped:
            return self._bytes[info.file][begin : begin + nbytes].copy()
        found = np.empty(nbytes, np.uint8)
        self._read_into(info.file, begin, memoryview(found))
        return found

    def _read_whole(self, index: int, view: memoryview) -> None:
        """Fill `view` [size of the file] with a file. Raises: WeightsError."""

        def read(start: int) -> None:
            self._read_into(index, start, view[start : start + _READ_BYTES])

        with ThreadPoolExecutor(_READERS) as readers:
            # The first error, or Ctrl-C, cancels the parts that are not begun.
            for _ in readers.map(read, range(0, len(view), _READ_BYTES)):
                pass

    def _read_into(self, index: int, start: int, view: memoryview) -> None:
        read_into(self._files[index], self.paths[index], start, view)


def dequantize_bytes(
    raw: NDArray[np.uint8], type_name: str, shape: Sequence[int], name: str = "tensor"
) -> torch.Tensor:
    """Float32 tensor of `shape` from GGML bytes.

    Args:
        name: for the message.

    Raises:
        WeightsError: the type cannot be dequantised.
    """
    row_bytes = raw.size * shape[-1] // int(np.prod(shape))
    rows = raw.reshape(-1, row_bytes)
    try:
        values = dequantize(rows, GGMLQuantizationType[type_name])
    except NotImplementedError:
        raise WeightsError(
            f"tensor {name!r}: GGML type {type_name} cannot be dequantised"
        ) from None
    # A float32 tensor comes back as a view of the mapping: torch must not get read-only memory.
    values = np.require(values, dtype=np.float32, requirements=["C", "W"])
    return torch.from_numpy(values).reshape(tuple(shape))
