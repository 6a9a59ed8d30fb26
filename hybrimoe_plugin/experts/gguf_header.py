"""Read a GGUF file's header with every count bounded by the file.

The `gguf` package's reader trusts the file: a hostile array length keeps it busy for ever, and an ordinary vocabulary
of 49,152 takes it two seconds. This one reads the same format (https://github.com/ggml-org/ggml, docs/gguf.md), checks
each length against what is left of the file before use, and leaves constants, block sizes and dequantisation to `gguf`.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.errors import WeightsError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4
_MAX_DIMS = 4


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as stored; its byte range has been checked against the file."""

    name: str
    type_name: str
    """GGML type, e.g. `Q4_K`."""
    shape: tuple[int, ...]
    """Outermost dimension first, as in torch."""
    nbytes: int
    offset: int
    """Bytes from the start of its file."""
    file: int
    """Index of its file in a split set."""


class _Cursor:
    """A position in the file that refuses to run past the end."""

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self.data = data
        self.path = path
        self.at = 0

    def fail(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path}: damaged GGUF header at byte {self.at}: {what}")

    def need(self, count: int, what: str) -> None:
        if count > len(self.data) - self.at:
            raise self.fail(f"{what} needs {count} bytes, {len(self.data) - self.at} are left")

    def scalar(self, form: str, what: str) -> Any:
        size = struct.calcsize(form)
        self.need(size, what)
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += size
        return value

    def text(self, what: str) -> str:
        length = self.scalar("<Q", what)
        self.need(length, what)
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY and depth < _MAX_DEPTH:
            return self._array(what, depth)
        raise self.fail(f"{what} has unknown value type {kind}")

    def _array(self, what: str, depth: int) -> list[Any]:
        kind, count = self.scalar("<I", what), self.scalar("<Q", what)
        if kind in _SCALARS:
            form = f"<{count}{_SCALARS[kind][1]}" if count <= len(self.data) else ""
            self.need(count * struct.calcsize(_SCALARS[kind]), what)
            values = list(struct.unpack_from(form, self.data, self.at))
            self.at += struct.calcsize(form)
            return values
        self.need(count * 8, what)  # a string or an array takes at least its own length field
        return [self.value(kind, what, depth + 1) for _ in range(count)]


def read_header(data: mmap.mmap, path: str, file: int) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Metadata and tensor table of one mapped GGUF file.

    Raises:
        WeightsError: not a GGUF file, or a count, type, shape or byte range does not fit the file.
    """
    cursor = _Cursor(data, path)
    if data[:4] != _MAGIC:
        raise WeightsError(f"{path}: not a GGUF file (it begins with {bytes(data[:4])!r})")
    cursor.at = 4
    version = cursor.scalar("<I", "version")
    if version not in _VERSIONS:
        raise WeightsError(f"{path}: GGUF version {version}, this program reads {_VERSIONS}")
    tensor_count, field_count = cursor.scalar("<Q", "tensor count"), cursor.scalar("<Q", "field count")
    cursor.need(tensor_count * 32 + field_count * 13, "the number of tensors and fields")
    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.text("a field's name")
        if key in metadata:
            raise cursor.fail(f"field {key!r} stands twice")
        metadata[key] = cursor.value(cursor.scalar("<I", key), key)
    raw = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}, not a power of two")
    start = -(-cursor.at // alignment) * alignment
    return metadata, _place(raw, start, len(data), path, file)


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type number, offset in the data section)."""
    name = cursor.text("a tensor's name")
    dims = cursor.scalar("<I", name)
    if not 1 <= dims <= _MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {dims} dimensions")
    shape = tuple(cursor.scalar("<Q", name) for _ in range(dims))
    return name, shape[::-1], cursor.scalar("<I", name), cursor.scalar("<Q", name)


def _place(
    raw: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int, path: str, file: int
) -> list[TensorInfo]:
    """Check types, shapes and ranges; raise WeightsError naming the tensor."""
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in raw:
        try:
            quant = GGMLQuantizationType(kind)
        except ValueError:
            raise WeightsError(f"{path}: tensor {name!r} has unknown type number {kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[quant]
        elements = 1
        for dim in shape:
            elements *= dim
        if elements == 0 or shape[-1] % block:
            raise WeightsError(f"{path}: tensor {name!r} of type {quant.name} has shape {shape}: rows must be a "
                               f"multiple of {block}")  # fmt: skip
        nbytes = elements // block * block_bytes
        if start + offset + nbytes > size:
            raise WeightsError(
                f"{path}: truncated: tensor {name!r} ends at byte {start + offset + nbytes}, the file has {size}"
            )
        if name in tensors:
            raise WeightsError(f"{path}: tensor {name!r} stands twice")
        tensors[name] = TensorInfo(name, quant.name, shape, nbytes, start + offset, file)
    return list(tensors.values())
