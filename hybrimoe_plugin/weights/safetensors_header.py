"""Read a safetensors file's header, every number checked against the file before use.

The format (https://github.com/huggingface/safetensors) is 8 bytes with the length of a JSON object,
that object, and the tensors' bytes, which it gives offsets into. The `safetensors` package hands
out tensors; kernels that read bytes where they lie need the offsets.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.gguf_header import TensorInfo

_LENGTH_BYTES = 8
_MAX_BYTES = 32 << 20
"""Bytes of a header; a file with 91,000 tensors, as many as DeepSeek-V3 has, needs 12 MiB."""
_MAX_DIMS = 8
_METADATA = "__metadata__"
_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Type of the format -> bytes of one value."""


def read_safetensors_header(data: mmap.mmap, where: str, file: int) -> list[TensorInfo]:
    """The tensors of a file, in the order of its header.

    Their types are named as the format does, which is GGML's name for BF16, F16 and F32.

    Args:
        where: the file, for messages.
        file: its index among the model's files.

    Raises:
        WeightsError: the file is not sound.
    """
    size = len(data)
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if size < _LENGTH_BYTES or start > size:
        raise WeightsError(f"{where}: no whole safetensors file: its header ends beyond the file")
    if length > _MAX_BYTES:
        raise WeightsError(
            f"{where}: a header of {length} bytes; more than {_MAX_BYTES} is refused"
        )
    try:
        entries = json.loads(data[_LENGTH_BYTES:start], object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{where}: the safetensors header cannot be read ({type(error).__name__}: "
            f"{str(error)[:200]})"
        ) from None
    if not isinstance(entries, dict):
        raise WeightsError(f"{where}: the safetensors header is no JSON object")
    entries.pop(_METADATA, None)
    found = [_tensor(name, entry, where, file, start, size) for name, entry in entries.items()]
    _check_apart(found, where)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _tensor(name: str, entry: Any, where: str, file: int, start: int, size: int) -> TensorInfo:
    """One entry, checked. Raises: WeightsError."""
    dtype, shape, offsets = _fields(entry)
    if dtype not in _BYTES:
        raise WeightsError(f"{where}: tensor {name!r} has unknown type {str(dtype)[:40]!r}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise WeightsError(f"{where}: tensor {name!r} has no valid shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise WeightsError(f"{where}: tensor {name!r} has no valid data_offsets")
    first, end = offsets
    if not first <= end <= size - start:
        raise WeightsError(f"{where}: the bytes of tensor {name!r} are not within the file")
    # Of eight numbers below 2^63 at most: a product that no file can hold is soon found.
    if math.prod(shape) * _BYTES[dtype] != end - first:
        raise WeightsError(
            f"{where}: tensor {name!r}: {dtype} of shape {tuple(shape)} does not take "
            f"{end - first} bytes"
        )
    return TensorInfo(name, dtype, tuple(shape), end - first, start + first, file)


def _fields(entry: Any) -> tuple[Any, Any, Any]:
    if not isinstance(entry, Mapping):
        return None, None, None
    return entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


def _check_apart(found: list[TensorInfo], where: str) -> None:
    """Raise WeightsError where tensors share bytes, which the format does not allow."""
    spans = sorted((info.offset, info.offset + info.nbytes, info.name) for info in found)
    end = 0
    for start, its_end, name in spans:
        if start < end:
            raise WeightsError(f"{where}: tensor {name!r} shares bytes with another tensor")
        end = max(end, its_end)
