"""A GGUF file taken apart, so that its parts can be changed and put together again,
soundly or not.
"""

from __future__ import annotations

import struct
from copy import copy
from dataclasses import dataclass, field
from typing import Any

SCALARS = {
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
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Field:
    """One entry of the metadata."""

    key: bytes
    kind: int
    value: Any
    """Bytes for a string; for an array (kind of its values, values, or with a third item the count
    that is stated).

    Bytes of any other kind are written as they are.
    """


@dataclass(frozen=True)
class Tensor:
    name: bytes
    shape: tuple[int, ...]
    kind: int
    offset: int
    dimensions: int | None = None
    """As stated; None for the true number."""


@dataclass
class File:
    version: int = 3
    fields: list[Field] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    data: bytes = b""
    counts: tuple[int | None, int | None] = (None, None)
    """Of tensors and fields, as stated; None for the true number."""

    def fresh(self) -> File:
        """A copy whose lists may be changed."""
        made = copy(self)
        made.fields, made.tensors = list(self.fields), list(self.tensors)
        return made


def parse(data: bytes) -> File:
    """Take a sound file apart."""
    at = 4

    def number(form: str) -> Any:
        nonlocal at
        value = struct.unpack_from(form, data, at)[0]
        at += struct.calcsize(form)
        return value

    def text() -> bytes:
        nonlocal at
        length = number("<Q")
        at += length
        return data[at - length : at]

    def value(kind: int) -> Any:
        if kind in SCALARS:
            return number(SCALARS[kind])
        if kind == STRING:
            return text()
        inner, count = number("<I"), number("<Q")
        return inner, [value(inner) for _ in range(count)]

    made = File(number("<I"))
    tensors, fields = number("<Q"), number("<Q")
    for _ in range(fields):
        key, kind = text(), number("<I")
        made.fields.append(Field(key, kind, value(kind)))
    for _ in range(tensors):
        name = text()
        shape = tuple(number("<Q") for _ in range(number("<I")))
        made.tensors.append(Tensor(name, shape, number("<I"), number("<Q")))
    made.data = data[-(-at // 32) * 32 :]
    return made


def serialise(file: File) -> bytes:
    """The file's bytes, with whatever it states."""
    tensors, fields = (
        len(real) if stated is None else stated
        for real, stated in zip((file.tensors, file.fields), file.counts, strict=True)
    )
    out = bytearray(b"GGUF" + struct.pack("<IQQ", file.version, tensors, fields))
    for entry in file.fields:
        out += _text(entry.key) + struct.pack("<I", entry.kind) + _value(entry.kind, entry.value)
    for tensor in file.tensors:
        dimensions = len(tensor.shape) if tensor.dimensions is None else tensor.dimensions
        out += _text(tensor.name) + struct.pack(
            f"<I{len(tensor.shape)}Q", dimensions, *tensor.shape
        )
        out += struct.pack("<IQ", tensor.kind, tensor.offset)
    return bytes(out + b"\0" * (-len(out) % 32) + file.data)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(kind: int, value: Any) -> bytes:
    if kind in SCALARS and not isinstance(value, bytes):
        return struct.pack(SCALARS[kind], value)
    if kind == STRING:
        return _text(value)
    if kind == ARRAY and not isinstance(value, bytes):
        inner, values, *stated = value
        head = struct.pack("<IQ", inner, stated[0] if stated else len(values))
        return head + b"".join(_value(inner, one) for one in values)
    return bytes(value)
