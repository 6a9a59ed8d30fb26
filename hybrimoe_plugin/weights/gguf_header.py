"""Read a GGUF file's header, with every count bounded by the file and by real models' needs.

The `gguf` package's reader trusts the file: a hostile array length keeps it busy for ever, and an
ordinary vocabulary of 49,152 tokens takes it two seconds. This one reads the same format
(https://github.com/ggml-org/ggml, docs/gguf.md), checks each length against what is left of the
file before use, and leaves constants, block sizes and dequantisation to `gguf`. A file may also be
large and empty, so there are absolute limits: reading a header takes a few seconds and 512 MiB at
most.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.gguf_advice import about_bytes

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
"""Value type of the format -> its form for `struct`."""
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4
_MAX_DIMS = 4
_MAX_BYTES = 128 << 20
"""Bytes of a header; those with the largest vocabularies have some 20 MiB."""
_MAX_ITEMS = 2 << 20
"""Values in all arrays together.

262,144 tokens with scores and types and 514,000 merges are 1.3 million.
"""
_NESTED = 32
"""What an array inside an array counts as in `_MAX_ITEMS`.

It takes so much longer to read, and no known model has any.
"""
_MAX_FIELDS, _MAX_TENSORS = 1 << 16, 1 << 18
_MAX_NAME = 1 << 16
"""Bytes of a name; the format's own limit is 2^16 - 1 for keys and 64 for tensors."""
_FIELD_BYTES, _TENSOR_BYTES = 13, 32
"""The fewest bytes that a field and a tensor's entry take in the header."""


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


class _Entry(NamedTuple):
    """One tensor as the header lists it, not yet checked."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first."""
    kind: int
    """Type number."""
    offset: int
    """Bytes from the start of the data section."""


class _Cursor:
    """A position in the header that refuses to run past the end."""

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self.data = data
        self.path = path
        self.at = 0
        self.size = min(len(data), _MAX_BYTES)
        self._items = 0

    def fail(self, what: str) -> WeightsError:
        return WeightsError(f"{self.path}: damaged GGUF header at byte {self.at}: {what}")

    def need(self, count: int, what: str) -> None:
        left = self.size - self.at
        if count > left:
            raise self.fail(f"{what} needs {count} bytes, {left} are left")

    def scalar(self, form: str, what: str) -> Any:
        size = struct.calcsize(form)
        self.need(size, what)
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += size
        return value

    def text(self, what: str, most: int = _MAX_BYTES) -> str:
        length = self.scalar("<Q", what)
        self.need(length, what)
        if length > most:
            raise self.fail(f"{what} has {length} bytes, more than {most}")
        end = self.at + length
        raw = self.data[self.at : end]
        self.at = end
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
        kind = self.scalar("<I", what)
        count = self.scalar("<Q", what)
        form = _SCALARS.get(kind)
        # A string or an array takes at least the 8 bytes of its own length.
        item_bytes = 8 if form is None else struct.calcsize(form)
        self.need(count * item_bytes, what)
        weight = _NESTED if kind == _ARRAY else 1
        self._items += count * weight
        if self._items > _MAX_ITEMS:
            raise self.fail(f"{what} has {count} values, with those before more than {_MAX_ITEMS}")
        if form is not None:
            return self._scalars(f"<{count}{form[1]}")
        if kind == _STRING:
            return self._texts(count, what)
        return [self.value(kind, what, depth + 1) for _ in range(count)]

    def _scalars(self, form: str) -> list[Any]:
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return list(values)

    def _texts(self, count: int, what: str) -> list[str]:
        """`text` many times, without its calls: a vocabulary is long."""
        read_length = struct.Struct("<Q").unpack_from
        data, size, at = self.data, self.size, self.at
        found = []
        for _ in range(count):
            start = at + 8
            end = start
            if start <= size:
                (length,) = read_length(data, at)
                end = start + length
            if end > size:
                self.at = at
                raise self.fail(f"{what} runs past the end, {size - at} bytes are left")
            raw = data[start:end]
            found.append(raw.decode("utf-8", errors="replace"))
            at = end
        self.at = at
        return found


def read_header(data: mmap.mmap, path: str, file: int) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Metadata and tensor table of one mapped GGUF file.

    Args:
        path: for messages.
        file: the file's index in its split set, which every `TensorInfo` gets.

    Raises:
        WeightsError: not a GGUF file, a count, type, shape or byte range does not fit the file, or
            tensors overlap.
    """
    cursor = _Cursor(data, path)
    magic = bytes(data[:4])
    if magic != _MAGIC:
        advice = about_bytes(data[:64])
        raise WeightsError(f"{path}: not a GGUF file (it begins with {magic!r}){advice}")
    cursor.at = 4
    version = cursor.scalar("<I", "version")
    if version not in _VERSIONS:
        known = " and ".join(str(known) for known in _VERSIONS)
        raise WeightsError(f"{path}: GGUF version {version}; versions {known} can be read")
    tensor_count = cursor.scalar("<Q", "tensor count")
    field_count = cursor.scalar("<Q", "field count")
    fewest_bytes = tensor_count * _TENSOR_BYTES + field_count * _FIELD_BYTES
    cursor.need(fewest_bytes, "the number of tensors and fields")
    if field_count > _MAX_FIELDS or tensor_count > _MAX_TENSORS:
        limits = f"more than {_MAX_FIELDS} and {_MAX_TENSORS}"
        raise cursor.fail(f"{field_count} fields and {tensor_count} tensors, {limits}")

    metadata = _fields(cursor, field_count)
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = _alignment(cursor, metadata)
    start = -(-cursor.at // alignment) * alignment
    tensors = _checked(entries, start, len(data), path, file)
    _check_order(tensors, start, alignment, path)
    return metadata, tensors


def _fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    """Key -> value of the metadata."""
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text("a field's name", _MAX_NAME)
        if key in metadata:
            raise cursor.fail(f"field {key!r} appears twice")
        kind = cursor.scalar("<I", key)
        metadata[key] = cursor.value(kind, key)
    return metadata


def _entry(cursor: _Cursor) -> _Entry:
    name = cursor.text("a tensor's name", _MAX_NAME)
    dims = cursor.scalar("<I", name)
    if not 1 <= dims <= _MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {dims} dimensions")
    innermost_first = [cursor.scalar("<Q", name) for _ in range(dims)]
    shape = tuple(reversed(innermost_first))
    kind = cursor.scalar("<I", name)
    offset = cursor.scalar("<Q", name)
    return _Entry(name, shape, kind, offset)


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    """Bytes that every tensor's offset is a multiple of."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is int and alignment >= 8 and alignment.bit_count() == 1:
        return alignment
    shown = str(alignment)[:60]
    raise cursor.fail(f"general.alignment is {shown}, not a power of two of at least 8")


def _checked(
    entries: list[_Entry], start: int, size: int, path: str, file: int
) -> list[TensorInfo]:
    """Check types, shapes and byte ranges.

    Args:
        start: byte at which the data section begins.
        size: bytes of the file.

    Raises:
        WeightsError: naming the tensor.
    """
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        try:
            quant = GGMLQuantizationType(kind)
        except ValueError:
            raise WeightsError(f"{path}: tensor {name!r} has unknown type number {kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[quant]
        elements = math.prod(shape)
        if elements == 0 or shape[-1] % block:
            raise WeightsError(
                f"{path}: tensor {name!r} of type {quant.name} has shape {shape}: rows must be a "
                f"multiple of {block}"
            )
        nbytes = elements // block * block_bytes
        first = start + offset
        end = first + nbytes
        if end > size:
            raise WeightsError(
                f"{path}: truncated: tensor {name!r} ends at byte {end}, the file has {size}; copy "
                "or download it again"
            )
        if name in tensors:
            raise WeightsError(f"{path}: tensor {name!r} appears twice")
        tensors[name] = TensorInfo(name, quant.name, shape, nbytes, first, file)
    return list(tensors.values())


def _check_order(tensors: list[TensorInfo], start: int, alignment: int, path: str) -> None:
    """Raise WeightsError for a tensor that is misaligned or begins inside another one."""
    end = start
    before = ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        begin = tensor.offset - start
        if begin % alignment:
            raise WeightsError(
                f"{path}: damaged: tensor {tensor.name!r} begins at byte {begin} of the weights, "
                f"no multiple of {alignment}"
            )
        if tensor.offset < end:
            raise WeightsError(f"{path}: damaged: tensors {before!r} and {tensor.name!r} overlap")
        end = tensor.offset + tensor.nbytes
        before = tensor.name
