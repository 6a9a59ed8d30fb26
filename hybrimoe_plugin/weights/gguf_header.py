"""Read a GGUF file's header with every count bounded by the file, and by what headers of real
models need.

The `gguf` package's reader trusts the file: a hostile array length keeps it busy for ever, and an
ordinary vocabulary of 49,152 takes it two seconds. This one reads the same format
(https://github.com/ggml-org/ggml, docs/gguf.md), checks each length against what is left of the
file before use, and leaves constants, block sizes and dequantisation to `gguf`. A file may be large
and empty, so there are limits besides: reading a header takes a few seconds and 512 MiB at most.
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
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4
_MAX_DIMS = 4
_MAX_BYTES = 128 << 20
"""Of a header; those with the largest vocabularies have some 20 MiB."""
_MAX_ITEMS = 2 << 20
"""In all arrays together: 262,144 tokens with scores and types and 514,000 merges are 1.3 million.
"""
_NESTED = 32
"""What an array inside an array counts for: it takes so much longer to read, and no known model has
any.
"""
_MAX_FIELDS, _MAX_TENSORS = 1 << 16, 1 << 18
_MAX_NAME = 1 << 16
"""Bytes; the format's own limit is 2^16 - 1 for keys and 64 for tensors."""


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
        self.size = min(len(data), _MAX_BYTES)
        self._items = 0

    def fail(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path}: damaged GGUF header at byte {self.at}: {what}")

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fail(f"{what} needs {count} bytes, {self.size - self.at} are left")

    def scalar(self, form: str, what: str) -> Any:
        size = struct.calcsize(form)
        self.need(size, what)
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += size
        return value

    def text(self, what: str, most: int = _MAX_BYTES) -> str:
        length = self.scalar("<Q", what)
        self.need(length, what)
        if length > most:
            raise self.fail(f"{what} has {length} bytes, more than {most}")
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
        # A string or an array takes at least its own length field.
        self.need(count * (struct.calcsize(_SCALARS[kind]) if kind in _SCALARS else 8), what)
        self._items += count * (_NESTED if kind == _ARRAY else 1)
        if self._items > _MAX_ITEMS:
            raise self.fail(f"{what} has {count} values, with those before more than {_MAX_ITEMS}")
        if kind in _SCALARS:
            form = f"<{count}{_SCALARS[kind][1]}"
            values = list(struct.unpack_from(form, self.data, self.at))
            self.at += struct.calcsize(form)
            return values
        if kind == _STRING:
            return self._texts(count, what)
        return [self.value(kind, what, depth + 1) for _ in range(count)]

    def _texts(self, count: int, what: str) -> list[str]:
        """A vocabulary: `text` many times, without its calls."""
        length_of, data, size, at = struct.Struct("<Q").unpack_from, self.data, self.size, self.at
        found = []
        for _ in range(count):
            end = at + 8
            if end <= size:
                end += length_of(data, at)[0]
            if end > size:
                self.at = at
                raise self.fail(f"{what} runs past the end, {size - at} bytes are left")
            found.append(data[at + 8 : end].decode("utf-8", errors="replace"))
            at = end
        self.at = at
        return found


def read_header(data: mmap.mmap, path: str, file: int) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Metadata and tensor table of one mapped GGUF file.

    Raises:
        WeightsError: not a GGUF file, a count, type, shape or byte range does not fit the file, or
            tensors overlap.
    """
    cursor = _Cursor(data, path)
    if data[:4] != _MAGIC:
        raise WeightsError(f"{path}: not a GGUF file (it begins with {bytes(data[:4])!r})")
    cursor.at = 4
    version = cursor.scalar("<I", "version")
    if version not in _VERSIONS:
        raise WeightsError(f"{path}: GGUF version {version}, this program reads {_VERSIONS}")
    tensor_count, field_count = (
        cursor.scalar("<Q", "tensor count"),
        cursor.scalar("<Q", "field count"),
    )
    cursor.need(tensor_count * 32 + field_count * 13, "the number of tensors and fields")
    if field_count > _MAX_FIELDS or tensor_count > _MAX_TENSORS:
        limits = f"more than {_MAX_FIELDS} and {_MAX_TENSORS}"
        raise cursor.fail(f"{field_count} fields and {tensor_count} tensors, {limits}")
    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.text("a field's name", _MAX_NAME)
        if key in metadata:
            raise cursor.fail(f"field {key!r} stands twice")
        metadata[key] = cursor.value(cursor.scalar("<I", key), key)
    raw = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise cursor.fail(
            f"general.alignment is {str(alignment)[:60]}, not a power of two of at least 8"
        )
    start = -(-cursor.at // alignment) * alignment
    tensors = _place(raw, start, len(data), path, file)
    _check_order(tensors, start, alignment, path)
    return metadata, tensors


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type number, offset in the data section)."""
    name = cursor.text("a tensor's name", _MAX_NAME)
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
            raise WeightsError(f"{path}: tensor {name!r} of type {quant.name} has shape {shape}: "
                               f"rows must be a "
                               f"multiple of {block}")  # fmt: skip
        nbytes = elements // block * block_bytes
        if start + offset + nbytes > size:
            raise WeightsError(
                f"{path}: truncated: tensor {name!r} ends at byte {start + offset + nbytes}, the "
                f"file has {size}; "
                "was it copied or downloaded whole?"
            )
        if name in tensors:
            raise WeightsError(f"{path}: tensor {name!r} stands twice")
        tensors[name] = TensorInfo(name, quant.name, shape, nbytes, start + offset, file)
    return list(tensors.values())


def _check_order(tensors: list[TensorInfo], start: int, alignment: int, path: str) -> None:
    """Raise WeightsError for a tensor that begins at no multiple of the alignment, or inside
    another one.
    """
    end, before = start, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if (tensor.offset - start) % alignment:
            raise WeightsError(
                f"{path}: damaged: tensor {tensor.name!r} begins at byte {tensor.offset - start} "
                f"of the weights, "
                f"no multiple of {alignment}"
            )
        if tensor.offset < end:
            raise WeightsError(f"{path}: damaged: tensors {before!r} and {tensor.name!r} overlap")
        end, before = tensor.offset + tensor.nbytes, tensor.name
