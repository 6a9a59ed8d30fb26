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
    scales: Floats
    """[N, groups]"""
    zeros: Floats | None
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
    info = store.info(name)
    if info.type_name not in ("F32", "F16", "BF16"):
        raise WeightsError(
            f"{store.directory}: tensor {name!r} is {info.type_name}, expected a float type"
        )
    raw = torch.from_numpy(store.read(name))
    found: Floats = dequant.dequantize(raw, info.type_name, info.shape).numpy()
    return found


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
    scales = floats(store, parts[1])
    if f"{stem}.weight_g_idx" in store.tensors:
        raise WeightsError(f"{where}: groups of columns in another order (g_idx) are not read")
    if len(shape) != 2 or words.shape != (shape[0], -(-shape[1] // _PER_WORD)):
        raise WeightsError(f"{where}: {words.shape} words do not hold {shape} codes of 4 bits")
    if scales.ndim != 2 or len(scales) != shape[0]:
        raise WeightsError(f"{where}: scales of shape {scales.shape} do not fit {shape}")
    zeros = None
    if f"{stem}.weight_zero_point" in store.tensors:
        parts.append(f"{stem}.weight_zero_point")
        packed = array(store, parts[-1], "I32")  # packed along the rows
        zeros = nibbles_of(packed.T).T[: shape[0]].astype(np.float32)
        _check_alike(zeros, scales, where)

    def codes(numbers: NDArray[np.int64]) -> Bytes:
        return nibbles_of(words[numbers])[:, : shape[1]]

    return Int4((shape[0], shape[1]), codes, scales, zeros), tuple(parts)


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
    scales = np.ascontiguousarray(_flat(floats(store, parts[1]), where).T)
    zeros = nibbles_of(_flat(array(store, parts[2], "I32"), where)).T.astype(np.float32)
    if settings.get("checkpoint_format", "gptq") == "gptq":
        zeros += 1  # stored less one, in the format's first version
    columns = _flat(words, where).shape[0] * _PER_WORD
    _check_alike(zeros, scales, where)
    if f"{stem}.g_idx" in store.tensors:
        parts.append(f"{stem}.g_idx")
        size = columns // max(1, scales.shape[1])
        usual = np.arange(columns) // max(1, size)
        if not np.array_equal(array(store, parts[-1], "I32"), usual):
            raise WeightsError(f"{where}: groups of columns in another order (g_idx) are not read")
    if f"{stem}.bias" in store.tensors and not store.dequantized(f"{stem}.bias").any():
        parts.append(f"{stem}.bias")  # some writers add zeros to every matrix
    if words.shape[1] != len(scales):
        raise WeightsError(f"{where}: codes and scales do not fit each other")

    def codes(numbers: NDArray[np.int64]) -> Bytes:
        return nibbles_of(words[:, numbers].T)

    # By the setting, not matrix by matrix: the experts of a layer must share one type.
    symmetric = bool(settings.get("sym")) and bool((zeros == _ZERO).all())
    return Int4((words.shape[1], columns), codes, scales, None if symmetric else zeros), tuple(
        parts
    )


def awq(store: SafetensorsStore, name: str, stem: str) -> tuple[Int4, tuple[str, ...]]:
    """AWQ (gemm): codes [M, N / 8], scales [M / group, N], zeros [M / group, N / 8].

    Eight neighbours share a word, in an order of their own.

    Raises:
        WeightsError: shapes that do not fit.
    """
    where = f"{store.directory}: {stem!r}"
    parts = (name, f"{stem}.scales", f"{stem}.qzeros")
    words = _flat(array(store, name, "I32"), where)
    scales = np.ascontiguousarray(_flat(floats(store, parts[1]), where).T)
    zeros = _awq_codes(_flat(array(store, parts[2], "I32"), where)).T.astype(np.float32)
    _check_alike(zeros, scales, where)
    if words.shape[1] * _PER_WORD != len(scales):
        raise WeightsError(f"{where}: codes and scales do not fit each other")

    def codes(numbers: NDArray[np.int64]) -> Bytes:
        taken = words[:, numbers // _PER_WORD].view(np.uint32)
        shifts = (_AWQ_ORDER[numbers % _PER_WORD] * 4).astype(np.uint32)
        return np.ascontiguousarray(((taken >> shifts) & 15).astype(np.uint8).T)

    return Int4((len(scales), len(words)), codes, scales, zeros), parts


def _awq_codes(words: NDArray[np.int32]) -> Bytes:
    """[G, N] from [G, N / 8]."""
    stored = nibbles_of(words).reshape(len(words), -1, _PER_WORD)
    return stored[..., _AWQ_ORDER].reshape(len(words), -1)


def _flat(values: NDArray[Any], where: str) -> NDArray[Any]:
    if values.ndim != 2:
        raise WeightsError(f"{where}: expected matrices, found shape {values.shape}")
    return values


def _check_alike(zeros: Floats, scales: Floats, where: str) -> None:
    if zeros.shape != scales.shape:
        raise WeightsError(
            f"{where}: zero points {zeros.shape} and scales {scales.shape} do not fit each other"
        )
