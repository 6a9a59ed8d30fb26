"""Open GGUF weights, a single file or a split set, without reading them: bytes are mapped, checked and shared."""

from __future__ import annotations

import contextlib
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.experts import dequant
from hybrimoe_plugin.experts.gguf_header import TensorInfo, read_header
from hybrimoe_plugin.experts.memory import huge_pages

_READ_BYTES = 1 << 26
_AT_A_TIME = 1 << 20
"""Values that are dequantised at a time: what lies between stays in the processor's cache."""
_SPLIT = re.compile(r"^(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$")


class GGUFStore:
    """Read-only view of GGUF weights.

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
        """Kernels that read these bytes where they lie; the first operator on the store sets them, all share them."""
        self._bytes: list[NDArray[np.uint8]] = []
        for index, path in enumerate(self.paths):
            data = _map(path)
            metadata, tensors = read_header(data, str(path), index)
            if index == 0:
                self.metadata = metadata
            for info in tensors:
                if info.name in self.tensors:
                    raise WeightsError(f"{path}: tensor {info.name!r} is in another part of the split set too")
                self.tensors[info.name] = info
            self._bytes.append(np.frombuffer(data, dtype=np.uint8))

    @classmethod
    def open(cls, path: str | Path | Sequence[str | Path]) -> GGUFStore:
        """Open a file, any part of a split set, a directory that holds one model, or a list of files.

        Raises:
            WeightsError: nothing there, several models, a part missing, or a file that is not sound GGUF.
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
        """Read the files into memory of the process's own, on huge pages where the system gives them.

        A mapped file lies on small pages, whose addresses the processor must look up all the time: reading experts in
        Q8_0 from huge pages is 1 to 14 % faster (docs/LOG.md). Call it before anything holds a view; the file's cached
        pages are left to the system, which may take them back.

        Raises:
            WeightsError: a file cannot be read any more.

        Mutates: the store.
        """
        for index, path in enumerate(self.paths):
            size = self._bytes[index].size
            memory = huge_pages(size)
            try:
                with path.open("rb", buffering=0) as file, memoryview(memory) as view:
                    done = 0
                    while done < size:
                        count = file.readinto(view[done : done + _READ_BYTES])
                        if not count:
                            raise WeightsError(f"{path}: became shorter while it was read")
                        done += count
            except OSError as error:
                raise WeightsError(f"{path}: cannot read the weights ({error.strerror or error})") from None
            values = np.frombuffer(memory, dtype=np.uint8)
            values.flags.writeable = False
            self._bytes[index] = values

    def info(self, name: str) -> TensorInfo:
        """Raises: WeightsError: no such tensor."""
        if name not in self.tensors:
            raise WeightsError(f"{self.paths[0]}: tensor {name!r} is missing")
        return self.tensors[name]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's stored bytes, 1-D uint8, read-only and not copied. Valid until `close`."""
        info = self.info(name)
        return self._bytes[info.file][info.offset : info.offset + info.nbytes]

    def dequantized(
        self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """A fresh tensor of the stored shape: `gguf.quants.dequantize` to the last bit, rounded to `dtype`.

        Args:
            device: where the tensor will be. The stored bytes go there and are dequantised there, a part at a time.

        Raises:
            WeightsError: missing, or of a type that `gguf` cannot dequantise.
        """
        info, raw = self.info(name), self.raw(name)
        if info.type_name not in dequant.supported():
            return dequantize_bytes(raw, info.type_name, info.shape, name).to(device, dtype)
        values = torch.empty(info.shape, dtype=dtype, device=device)
        flat, done = values.view(-1), 0
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[info.type_name]]
        step = _AT_A_TIME // block * block_bytes
        with _one_thread():
            for first in range(0, raw.size, step):
                # A copy: the mapping is read-only memory, which must not reach torch.
                stored = torch.from_numpy(raw[first : first + step].copy()).to(device)
                count = stored.numel() // block_bytes * block
                flat[done : done + count] = dequant.dequantize(stored, info.type_name, (count,))
                done += count
        return values

    def close(self) -> None:
        """Drop the mappings; they are unmapped once no view of them is left."""
        self._bytes.clear()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small operations in a row on one thread: a team of threads that wait for one another is slower, and where other
    processes want the cores several times so. One thread takes half as long as `gguf` for Q4_K and Q6_K."""
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
        raise WeightsError(f"tensor {name!r}: GGML type {type_name} cannot be dequantised") from None
    # A float32 tensor comes back as a view of the mapping: read-only memory must not reach torch.
    values = np.require(values, dtype=np.float32, requirements=["C", "W"])
    return torch.from_numpy(values).reshape(tuple(shape))


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # mmap refuses an empty file
        raise WeightsError(f"{path}: the file is empty") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot open the weights file ({error.strerror or error})") from None


def _resolve(path: Path) -> list[Path]:
    """All files of the model that `path` names."""
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if not files:
            raise WeightsError(f"{path}: no .gguf file in this directory")
        models = {match["stem"] if (match := _SPLIT.match(file.name)) else file.name for file in files}
        if len(models) > 1:
            raise WeightsError(f"{path}: holds several models ({', '.join(sorted(models))}): name one file")
        path = files[0]
    match = _SPLIT.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing or count == 0:
        raise WeightsError(f"{path}: the split set lacks {', '.join(missing) or 'all parts'}")
    return parts
