"""The quantisation methods that are read: which tensors make up a matrix, and what it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers.convert import blocks, readers
from hybrimoe_plugin.weights.safetensors_store import SafetensorsStore

Rows = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
"""Numbers of rows -> their bytes [R, bytes of a row]."""


@dataclass(frozen=True)
class Source:
    """One tensor of the model, made from one or several of the checkpoint."""

    name: str
    """As an unquantised checkpoint would have it: `...q_proj.weight`."""
    type_name: str
    """GGML type."""
    shape: tuple[int, ...]
    rows: Rows
    """Rows of all dimensions but the last, as one."""

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.type_name, self.shape[-1] if self.shape else 1)


class Method(NamedTuple):
    """How a checkpoint is quantised."""

    name: str
    fp8: str
    """GGML type for FP8: Q8_0 or BF16."""
    settings: Mapping[str, Any]


def row_bytes(type_name: str, columns: int) -> int:
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return columns // block * nbytes


def sources(store: SafetensorsStore, method: Method) -> Iterator[Source]:
    """Every tensor of a checkpoint, each of its files' tensors used once.

    Raises:
        WeightsError: tensors that the method does not have, or of a form that is not read.
    """
    used: set[str] = set()
    for name in store.tensors:
        for end, make in _ENDS.get(method.name, {}).items():
            if name.endswith(end):
                matrix, parts = make(store, name, name.removesuffix(end), method)
                used.update(parts)
                yield matrix
    for name, info in store.tensors.items():
        if name in used:
            continue
        if info.type_name not in ("BF16", "F16", "F32"):
            raise WeightsError(
                f"{store.directory}: tensor {name!r} of type {info.type_name} is none that "
                f"{method.name} stores"
            )
        yield _plain(store, name)


def method_of(values: Mapping[str, Any], fp8: str, where: str) -> Method:
    """The method that a config.json names.

    Raises:
        WeightsError: it is none that is read.
    """
    found = values.get("quantization_config") or values.get("compression_config")
    if not found:
        return Method("none", fp8, {})
    settings = found if isinstance(found, Mapping) else {}
    name = settings.get("quant_method")
    if name == "compressed-tensors":
        form = settings.get("format")
        if form != "pack-quantized":
            raise WeightsError(
                f"{where}: compressed-tensors of format {str(form)[:40]!r} is not read, only "
                "'pack-quantized'"
            )
    elif name in ("gptq", "awq"):
        if settings.get("bits") != 4:
            raise WeightsError(f"{where}: {name} with {settings.get('bits')!r} bits is not read")
        if name == "awq" and settings.get("version", "gemm") != "gemm":
            raise WeightsError(f"{where}: awq of version {settings['version']!r} is not read")
    elif name not in ("fp8", "mxfp4"):
        known = "compressed-tensors, gptq, awq, fp8, mxfp4"
        raise WeightsError(f"{where}: quantised with {str(name)[:40]!r}; {known} are read")
    return Method(str(name), fp8, settings)


def _plain(store: SafetensorsStore, name: str) -> Source:
    info = store.info(name)
    columns = info.shape[-1] if info.shape else 1
    table = store.raw(name).reshape(-1, row_bytes(info.type_name, columns))
    kind = info.type_name

    def rows(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        return table[numbers]

    return Source(name, kind, info.shape, rows)


def _mxfp4(store: SafetensorsStore, name: str, stem: str, _method: Method) -> tuple[Source, Any]:
    if "MXFP4" not in GGMLQuantizationType.__members__:
        raise WeightsError(
            f"{store.directory}: the gguf package does not know MXFP4 yet: pip install -U gguf"
        )
    parts = (name, f"{stem}_scales")
    packed, scales = (readers.array(store, part, "U8") for part in parts)
    if packed.ndim < 3 or packed.shape[-1] != 16 or packed.shape[:-1] != scales.shape:
        raise WeightsError(f"{store.directory}: {name!r} and {parts[1]!r} do not fit each other")
    shape = (*packed.shape[:-2], packed.shape[-2] * blocks.VALUES)
    packed = packed.reshape(-1, *packed.shape[-2:])
    scales = scales.reshape(len(packed), -1)

    def rows(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        return blocks.mxfp4(packed[numbers], scales[numbers])

    return Source(stem, "MXFP4", shape, rows), parts


def _fp8(store: SafetensorsStore, name: str, stem: str, method: Method) -> tuple[Source, Any]:
    weight = f"{stem}.weight"
    info = store.info(weight)
    values = readers.array(store, weight, "F8_E4M3")
    scales_shape = store.info(name).shape
    size = method.settings.get("weight_block_size")
    if size != [128, 128] or values.ndim != 2:
        raise WeightsError(f"{store.directory}: {weight!r}: FP8 is read in blocks of 128 x 128")
    if scales_shape != tuple(-(-count // 128) for count in values.shape):
        raise WeightsError(f"{store.directory}: {weight!r} and {name!r} do not fit each other")
    kind = method.fp8 if values.shape[1] % blocks.VALUES == 0 else "BF16"
    encode = blocks.q8_0 if kind == "Q8_0" else blocks.bf16

    def rows(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        scales, table = readers.floats(store, name), readers.fp8_values()
        wide = np.repeat(scales[numbers // 128], 128, axis=1)[:, : values.shape[1]]
        products = table[values[numbers]] * wide
        if not np.isfinite(products).all():
            raise WeightsError(f"{store.directory}: {weight!r} holds values that are not finite")
        return encode(products)

    return Source(weight, kind, info.shape, rows), (weight, name)


def _int4(
    store: SafetensorsStore, stem: str, found: readers.Int4, parts: tuple[str, ...]
) -> tuple[Source, Any]:
    """Q4_0 where every zero point is 8, else Q4_1."""
    where = f"{store.directory}: {stem!r}"
    rows_count, columns = found.shape
    groups = found.groups
    if groups == 0 or columns % groups or (columns // groups) % blocks.VALUES:
        raise WeightsError(
            f"{where}: groups of a size that is no multiple of {blocks.VALUES} are not read"
        )
    repeats = columns // groups // blocks.VALUES

    def rows(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        codes = found.codes(numbers)
        scales = np.repeat(found.scales()[numbers], repeats, axis=1)
        if found.zeros is None:
            return blocks.q4_0(codes, scales, where)
        zeros = np.repeat(found.zeros()[numbers], repeats, axis=1)
        return blocks.q4_1(codes, scales, zeros, where)

    kind = "Q4_0" if found.zeros is None else "Q4_1"
    return Source(f"{stem}.weight", kind, (rows_count, columns), rows), parts


def _compressed(store: SafetensorsStore, name: str, stem: str, _method: Method) -> Any:
    found, parts = readers.compressed(store, name, stem)
    return _int4(store, stem, found, parts)


def _gptq(store: SafetensorsStore, name: str, stem: str, method: Method) -> Any:
    found, parts = readers.gptq(store, name, stem, method.settings)
    return _int4(store, stem, found, parts)


def _awq(store: SafetensorsStore, name: str, stem: str, _method: Method) -> Any:
    found, parts = readers.awq(store, name, stem)
    return _int4(store, stem, found, parts)


_ENDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "mxfp4": {"_blocks": _mxfp4},
    "fp8": {".weight_scale_inv": _fp8},
    "compressed-tensors": {".weight_packed": _compressed},
    "gptq": {".qweight": _gptq},
    "awq": {".qweight": _awq},
}
"""Method -> end of the name of the tensor that tells a quantised matrix -> what reads it."""
