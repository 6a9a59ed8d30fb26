"""Arrays of quantised checkpoints, with types and shapes checked, and codes in plain order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers.convert.blocks import Bytes, Floats, nibbles_of
from hybrimoe_plugin.weights import dequant
from hybrimoe_plugin.weights.gguf_header import TensorInfo
from hybrimoe_plugin.weights.safetensors_store import SafetensorsStore

_DTYPES: Mapping[str, Any] = {"U8": np.uint8, "F8_E4M3": np.uint8, "I32": "<i4", "I64": "<i8"}
_PER_WORD = 8
"""Codes of 4 bits in a word."""
_ZERO = 8
"""The code of 0 in symmetric quantisation."""
_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word each of eight neighbours is, counted from the lowest bits."""


class Int4(NamedTuple):
    """A matrix [N, M] of (code - zero) * scale."""

    shape: tuple[int, int]
    codes: Callable[[NDArray[np.int64]], Bytes]
    """Numbers of rows -> [R, M], 0 to 15."""
    groups: int
    """Groups of columns with one scale."""
    scales: Callable[[], Floats]
    """[N, groups]; read when called, as all of a large model's would fill the memory."""
    zeros: Callable[[], Floats] | None
    """[N, groups]; None where all are 8."""


def array(store: SafetensorsStore, name: str, dtype: str) -> NDArray[Any]:
    """A view of a tensor. Raises: WeightsError: missing, or of another type."""
    info = store.info(name)
    if info.type_name != dtype:
        raise WeightsError(
            f"{store.directory}: tensor {name!r} is {info.type_name}, expected {dtype}"
        )
    found: NDArray[Any] = store.raw(name).view(_DTYPES[dtype]).reshape(info.shape)
    return found


def floats(store: SafetensorsStore, name: str) -> Floats:
    """A copy in float32. Raises: WeightsError: missing, or no floating-point numbers."""
    info = _float_info(store, name)
    raw = torch.from_numpy(store.read(name))
    found: Floats = dequant.dequantize(raw, info.type_name, info.shape).numpy()
    return found


def _float_info(store: SafetensorsStore, name: str) -> TensorInfo:
    info = store.info(name)
    if info.type_name not in ("F32", "F16", "BF16"):
        raise WeightsError(
            f"{store.directory}: tensor {name!r} is {info.type_name}, expected a float type"
        )
    return info


def fp8_values() -> Floats:
    """[256] the value of each byte of FP8 (E4M3)."""
    every = torch.arange(256, dtype=torch.uint8)
    found: Floats = every.view(torch.float8_e4m3fn).float().numpy()
    return found


def compressed(store: SafetensorsStore, name: str, stem: str) -> tuple[Int4, tuple[str, ...]]:
    """compressed-tensors, pack-quantized: codes [N, M / 8], scales and zeros for groups of columns.

    Raises:
        WeightsError: not 4 bits, columns in another order, or shapes that do not fit.
    """
    where = f"{store.directory}: {stem!r}"
    parts = [name, f"{stem}.weight_scale", f"{stem}.weight_shape"]
    words = array(store, name, "I32")
    shape = tuple(int(count) for count in array(store, parts[2], "I64").reshape(-1))
    scales = _float_info(store, parts[1]).shape
    if f"{stem}.weight_g_idx" in store.tensors:
        raise WeightsError(f"{where}: groups of columns in another order (g_idx) are not read")
    if len(shape) != 2 or words.shape != (shape[0], -(-shape[1] // _PER_WORD)):
        raise WeightsError(f"{where}: {words.shape} words do not hold {shape} codes of 4 bits")
    if len(scales) != 2 or scales[0] != shape[0]:
        raise WeightsError(f"{where}: scales of shape {scales} do not fit {shape}")
    zeros: Callable[[], Floats] | None = None
    if f"{stem}.weight_zero_point" in store.tensors:
        parts.append(f"{stem}.weight_zero_point")
        packed = array(store, parts[-1], "I32")  # packed along the rows
        _check_zeros(packed.shape, (-(-shape[0] // _PER_WORD), scales[1]), where)

        def read_zeros() -> Floats:
            return nibbles_of(packed.T).T[: shape[0]].astype(np.float32)

        zeros = read_zeros

    def codes(numbers: NDArray[np.int64]) -> Bytes:
        return nibbles_of(words[numbers])[:, : shape[1]]

    def read_scales() -> Floats:
        return floats(store, parts[1])

    return Int4((shape[0], shape[1]), codes, scales[1], read_scales, zeros), tuple(parts)


def gptq(
    store: SafetensorsStore, name: str, stem: str, settings: Mapping[str, Any]
) -> tuple[Int4, tuple[str, ...]]:
    """GPTQ: codes [M / 8, N], scales [M / group, N], zeros [M / group, N / 8].

    Raises:
        WeightsError: columns in another order, or shapes that do not fit.
    """
    where = f"{store.directory}: {stem!r}"
    parts = [name, f"{stem}.scales", f"{stem}.qzeros"]
    words = array(store, name, "I32")
    scales = _float_info(store, parts[1]).shape
    packed = array(store, parts[2], "I32")
    columns = _flat(words, where).shape[0] * _PER_WORD
    rows = words.shape[1]
    if len(scales) != 2 or scales[1] != rows or rows % _PER_WORD:
        raise WeightsError(f"{where}: codes and scales do not fit each other")
    _check_zeros(packed.shape, (scales[0], rows // _PER_WORD), where)
    groups = scales[0]
    # Stored less one, in the format's first version.
    less = int(settings.get("checkpoint_format", "gptq") == "gptq")
    # By the setting, not matrix by matrix: the experts of a layer must share one type.
    symmetric = bool(settings.get("sym"))
    if f"{stem}.g_idx" in store.tensors:
        parts.append(f"{stem}.g_idx")
        size = columns // max(1, groups)
        usual = np.arange(columns) // max(1, size)
        if not np.array_equal(array(store, parts[-1], "I32"), usual):
            raise WeightsError(f"{where}: groups of columns in another order (g_idx) are not read")
    if f"{stem}.bias" in store.tensors and not store.dequantized(f"{stem}.bias").any():
        parts.append(f"{stem}.bias")  # some writers add zeros to every matrix

    def codes(numbers: NDArray[np.int64]) -> Bytes:
        return nibbles_of(words[:, numbers].T)

    def zeros() -> Floats:
        return nibbles_of(packed).T.astype(np.float32) + less

    def read_scales() -> Floats:
        if symmetric and not bool((zeros() == _ZERO).all()):
            raise WeightsError(f"{where}: config.json says sym, and zero points are not {_ZERO}")
        return np.ascontiguousarray(floats(store, parts[1]).T)

    found = Int4((rows, columns), codes, groups, read_scales, None if symmetric else zeros)
    return found, tuple(parts)


def awq(store: SafetensorsStore, name: str, stem: str) -> tuple[Int4, tuple[str, ...]]:
    """AWQ (gemm): codes [M, N / 8], scales [M / group, N], zeros [M / group, N / 8].

    Eight neighbours share a word, in an order of their own.

    Raises:
        WeightsError: shapes that do not fit.
    """
    where = f"{store.directory}: {stem!r}"
    parts = (name, f"{stem}.scales", f"{stem}.qzeros")
    words = _flat(array(store, name, "I32"), where)
    scales = _float_info(store, parts[1]).shape
    packed = array(store, parts[2], "I32")
    rows = words.shape[1] * _PER_WORD
    if len(scales) != 2 or scales[1] != rows:
        raise WeightsError(f"{where}: codes and scales do not fit each other")
    _check_zeros(packed.shape, (scales[0], words.shape[1]), where)

    def codes(numbers: NDArray[np.int64]) -> Bytes:
        taken = words[:, numbers // _PER_WORD].view(np.uint32)
        shifts = (_AWQ_ORDER[numbers % _PER_WORD] * 4).astype(np.uint32)
        return np.ascontiguousarray(((taken >> shifts) & 15).astype(np.uint8).T)

    def zeros() -> Floats:
        return _awq_codes(packed).T.astype(np.float32)

    def read_scales() -> Floats:
        return np.ascontiguousarray(floats(store, parts[1]).T)

    return Int4((rows, len(words)), codes, scales[0], read_scales, zeros), parts


def _awq_codes(words: NDArray[np.int32]) -> Bytes:
    """[G, N] from [G, N / 8]."""
    stored = nibbles_of(words).reshape(len(words), -1, _PER_WORD)
    return stored[..., _AWQ_ORDER].reshape(len(words), -1)


def _flat(values: NDArray[Any], where: str) -> NDArray[Any]:
    if values.ndim != 2:
        raise WeightsError(f"{where}: expected matrices, found shape {values.shape}")
    return values


def _check_zeros(found: tuple[int, ...], wanted: tuple[int, ...], where: str) -> None:
    if found != wanted:
        raise WeightsError(f"{where}: zero points of shape {found}, the scales ask for {wanted}")
