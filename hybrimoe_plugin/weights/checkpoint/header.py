"""The header of a safetensors file: what is where, checked against the file.

    8 bytes       n bytes                                            the rest
    | n, little-  | {"name": {"dtype": "BF16", "shape": [E, N, M],   | tensors, one behind
    | endian      |           "data_offsets": [begin, end]}, ...}    | the other

Offsets count from the end of the JSON text. The format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from mmap import mmap
from typing import Any

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights.gguf_header import TensorInfo

FLOATS = ("F32", "F16", "BF16")
"""Types that are GGML's too, under the same names."""
_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"I16": 2, "U16": 2, "F16": 2, "BF16": 2},
    **{"I32": 4, "U32": 4, "F32": 4},
    **{"I64": 8, "U64": 8, "F64": 8},
}
_LARGEST_HEADER = 100_000_000
"""As the library allows."""
_MOST_DIMENSIONS = 8


def read_header(data: mmap, where: str, file: int) -> list[TensorInfo]:
    """The tensors of one file.

    Args:
        where: its path, for messages.
        file: its index among the checkpoint's files.

    Raises:
        WeightsError: it is not sound.
    """
    if len(data) < 8:
        raise WeightsError(f"{where}: too short for a safetensors file")
    size = int.from_bytes(data[:8], "little")
    if size > min(_LARGEST_HEADER, len(data) - 8):
        raise WeightsError(f"{where}: its header would take {size} bytes, which are not there")
    try:
        entries = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where}: its header is no JSON ({error})") from None
    if not isinstance(entries, dict):
        raise WeightsError(f"{where}: its header is no JSON object")
    entries.pop("__metadata__", None)
    start = 8 + size
    return [_checked(name, entry, start, len(data), where, file) for name, entry in entries.items()]


def _checked(name: str, entry: Any, start: int, end: int, where: str, file: int) -> TensorInfo:
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if kind not in _BYTES:
        raise WeightsError(f"{where}: tensor {name!r} has an unknown dtype {str(kind)[:40]!r}")
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise WeightsError(f"{where}: tensor {name!r} has no sound shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise WeightsError(f"{where}: tensor {name!r} has no sound place in the file")
    begin, stop = offsets
    nbytes = math.prod(shape) * _BYTES[kind]
    if stop - begin != nbytes or start + stop > end:
        raise WeightsError(
            f"{where}: tensor {name!r} of shape {shape} in {kind} does not lie at bytes {begin} to "
            f"{stop} of a file that has {end - start} for tensors"
        )
    return TensorInfo(name, kind, tuple(shape), nbytes, start + begin, file)


def _are_counts(values: Any) -> bool:
    """Whether this is a list of whole numbers from 0 on; True and False are none."""
    return isinstance(values, list) and all(type(item) is int and item >= 0 for item in values)
