"""Matrices of types without a kernel in a type that has one: made by ggml, a part at a time.

The C functions of kt-kernel's ggml convert about twice as fast as numpy does, and leave Python's
lock to others: every core takes a part (docs/LOG.md).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from hybrimoe_plugin.compute.cpu.ggml.binding import GgmlBinding
from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel
from hybrimoe_plugin.compute.cpu.requantise.mxfp4 import as_q5_0
from hybrimoe_plugin.device.memory import human
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.dequant import dequantize, supported
from hybrimoe_plugin.weights.gguf_store import dequantize_bytes

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_FLOATS = ("F32", "F16", "BF16")
_READ_IN_C = frozenset(
    {
        "Q4_1",
        "Q5_1",
        "IQ1_S",
        "IQ1_M",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ3_XXS",
        "IQ3_S",
        "IQ4_NL",
        "IQ4_XS",
        "MXFP4",
    }
)
"""Types that kt-kernel's ggml reads as gguf does (tests/compute/requantise).

It ends the process on TQ1_0 and TQ2_0, and does not know NVFP4.
"""
_VALUES_AT_A_TIME = 1 << 18
"""1 MiB of float32 between the two conversions: it stays in a core's cache."""
_LARGEST = {"Q8_0": 127 * 65504.0, "F16": 65504.0, "BF16": 3.38e38}
"""The largest value that each target holds: 16-bit scales end at 65504."""


class Requantised(NamedTuple):
    """Tensors of one type that are requantised or dequantised, for notices and errors."""

    type_name: str
    target: str
    tensors: tuple[str, ...]
    """As the file names them."""
    stored_bytes: int
    nbytes: int
    """Of the copies."""
    on_device: bool = False
    """Whether it is an accelerator that has no kernel; then they are dequantised to `target`."""

    def text(self) -> str:
        """The tensors, what becomes of them and what it costs, as one clause."""
        count = len(self.tensors)
        which = self.tensors[0] if count == 1 else f"{count} tensors, such as {self.tensors[0]}"
        return (
            f"no {'device' if self.on_device else 'CPU'} kernel for {self.type_name} ({which}): "
            f"{'dequantised' if self.on_device else 'requantised'} to {self.target}, which takes "
            f"{human(self.nbytes)} of memory (the file has them in {human(self.stored_bytes)})"
        )


def by_type(found: Iterable[Requantised]) -> tuple[Requantised, ...]:
    """The same with one item for each pair of types, the costliest first."""
    groups: dict[tuple[str, str, bool], Requantised] = {}
    for item in found:
        key = item.type_name, item.target, item.on_device
        group = groups.get(key)
        if group is not None:
            item = item._replace(
                tensors=group.tensors + item.tensors,
                stored_bytes=group.stored_bytes + item.stored_bytes,
                nbytes=group.nbytes + item.nbytes,
            )
        groups[key] = item
    return tuple(sorted(groups.values(), key=lambda item: -item.nbytes))


def replacement(type_name: str, types: Container[str]) -> str:
    """The type among those with kernels that loses least.

    MXFP4 loses nothing as Q5_0. Floats become a 16-bit type, all others Q8_0.
    """
    if type_name == "MXFP4" and "Q5_0" in types:
        return "Q5_0"
    if type_name not in _FLOATS:
        return "Q8_0"
    return "BF16" if "BF16" in types else "F16"


def bytes_in(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a matrix of this shape in a type."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return math.prod(shape) // block * block_bytes


class Requantiser:
    """Converts stored bytes from any type that can be dequantised into one with a kernel.

    Without a ggml that was checked, gguf's numpy takes its place: the same bytes, but slower.

    Args:
        threads: parts that are converted at once.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or torch.get_num_threads()
        self._library: ctypes.CDLL | None = None
        try:
            GgmlBinding()  # checks the release, and lets ggml fill the tables that it reads with
        except BackendError:
            return
        self._library = ctypes.CDLL(str(import_kernel().__file__))

    def convert(self, stored: Bytes, type_name: str, target: str) -> Bytes:
        """The same values in another type, as 1-D bytes in memory of their own.

        Args:
            stored: 1-D, whole blocks.
            target: Q8_0, F16 or BF16; for MXFP4 also Q5_0.

        Raises:
            BackendError: values that are not finite, or beyond the target's range.
            WeightsError: the type cannot be dequantised.
        """
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
        made = np.empty(bytes_in(target, (stored.size // block_bytes * block,)), np.uint8)
        self.convert_into(made, stored, type_name, target)
        return made

    def convert_into(self, made: Bytes, stored: Bytes, type_name: str, target: str) -> None:
        """The same, into memory of the right size. Mutates: `made`."""
        convert = as_q5_0 if target == "Q5_0" else self._through_floats(type_name, target)
        step = bytes_in(type_name, (_VALUES_AT_A_TIME,))
        made_step = bytes_in(target, (_VALUES_AT_A_TIME,))

        def part(index: int) -> None:
            convert(
                stored[index * step : (index + 1) * step],
                made[index * made_step : (index + 1) * made_step],
            )

        parts = range(-(-stored.size // step))
        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(part, parts):
                pass

    def _through_floats(self, type_name: str, target: str) -> Callable[[Bytes, Bytes], None]:
        """What converts a part: dequantised, checked and quantised again."""
        read, write = self._reader(type_name), self._writer(target)

        def convert(stored: Bytes, made: Bytes) -> None:
            values = read(stored)
            _check_range(values, type_name, target)
            write(values, made)

        return convert

    def _reader(self, type_name: str) -> Callable[[Bytes], Floats]:
        """Stored bytes -> their values, 1-D."""
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
        if self._library is None or type_name not in _READ_IN_C:
            return lambda stored: _values(stored, type_name, stored.size // block_bytes * block)
        function = getattr(self._library, f"dequantize_row_{type_name.lower()}")
        function.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
        function.restype = None

        def read(stored: Bytes) -> Floats:
            values = np.empty(stored.size // block_bytes * block, np.float32)
            function(stored.ctypes.data, values.ctypes.data, values.size)
            return values

        return read

    def _writer(self, target: str) -> Callable[[Floats, Bytes], None]:
        """Values -> their bytes, written to memory of the right size."""
        if self._library is None or target != "Q8_0":
            return lambda values, made: _write(values, made, target)
        quantise = self._library.ggml_quantize_chunk
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        quantise.argtypes = ctypes.c_int, pointer, pointer, number, number, number, pointer
        quantise.restype = ctypes.c_size_t
        kind = int(GGMLQuantizationType[target])

        def write(values: Floats, made: Bytes) -> None:
            quantise(kind, values.ctypes.data, made.ctypes.data, 0, 1, values.size, None)

        return write


def _values(stored: Bytes, type_name: str, count: int) -> Floats:
    """In torch where it has the type, else by gguf. Raises: WeightsError."""
    if type_name not in supported():
        return dequantize_bytes(stored, type_name, (count,)).numpy()
    raw = torch.from_numpy(stored.copy())  # torch warns of memory that must not be written to
    return dequantize(raw, type_name, (count,)).numpy()


def _write(values: Floats, made: Bytes, target: str) -> None:
    made[:] = quantize(values, GGMLQuantizationType[target]).view(np.uint8).ravel()


def _check_range(values: Floats, type_name: str, target: str) -> None:
    """Raises: BackendError: what the target would store as another value without a word."""
    largest = float(np.abs(values).max(initial=0.0))  # NaN where there is one
    if not largest <= _LARGEST[target]:
        raise BackendError(
            f"weights in {type_name} are not finite or beyond the range of {target} ({largest:g}), "
            "and there is no kernel for them as they are"
        )
