"""Quantised rows of other formats as rows of GGML blocks; whether that is exact is said at each.

GGML's blocks of 32 values with 4 bits each hold value i in the low half of byte i, and value 16 + i
in its high half.
"""

from __future__ import annotations

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from hybrimoe_plugin.errors import WeightsError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

VALUES = 32
"""Values of a block."""
_HALF_ERROR = 2.0**-11
"""The largest relative error of rounding to float16, down to 2^-14."""
_HALF_STEP = 2.0**-25
"""The largest error below: groups of zeros often have a scale that small."""


def mxfp4(blocks: Bytes, scales: Bytes) -> Bytes:
    """MXFP4 with neighbours in one byte, as GGML's MXFP4: the same codes and scales, so exact.

    Args:
        blocks: [R, M / 32, 16]; value 2i is in the low half of byte i.
        scales: [R, M / 32], exponents with bias 127.

    Returns:
        [R, M / 32 * 17]
    """
    pairs = np.stack((blocks & 15, blocks >> 4), axis=-1)
    codes = pairs.reshape(*blocks.shape[:2], VALUES)
    return _rows(scales[..., None], _nibbles(codes))


def q4_0(codes: Bytes, scales: Floats, where: str) -> Bytes:
    """Values (code - 8) * scale as Q4_0: exact where float16 holds the scale.

    Else the error is that of rounding it: 2^-11 of each value, or 2^-22, at most.

    Args:
        codes: [R, M], 0 to 15.
        scales: [R, M / 32].

    Raises:
        WeightsError: a scale is out of float16's range.
    """
    return _rows(_half_bytes(scales, where), _nibbles(_in_blocks(codes)))


def q4_1(codes: Bytes, scales: Floats, zeros: Floats, where: str) -> Bytes:
    """Values (code - zero) * scale as Q4_1: exact where float16 holds scale and -zero * scale.

    Else the error is that of rounding them: 2^-11 of each of these two products at most.

    Args:
        codes: [R, M], 0 to 15.
        scales: [R, M / 32].
        zeros: [R, M / 32].

    Raises:
        WeightsError: a scale is out of float16's range.
    """
    least = _half_bytes(-zeros * scales, where)
    return _rows(_half_bytes(scales, where), least, _nibbles(_in_blocks(codes)))


def q8_0(values: Floats) -> Bytes:
    """Q8_0: the error is at most 1/250 of the largest value of a block of 32, plus 2^-18.

    Args:
        values: [R, M]

    Returns:
        [R, M / 32 * 34]
    """
    rows: Bytes = quantize(values, GGMLQuantizationType.Q8_0)
    return rows


def bf16(values: Floats) -> Bytes:
    """BF16: the error is at most 2^-9 of each value; none where a scale is a power of two.

    Returns:
        [R, M * 2] from [R, M]
    """
    rows: Bytes = quantize(values, GGMLQuantizationType.BF16)
    return rows.view(np.uint8)


def nibbles_of(words: NDArray[np.int32]) -> Bytes:
    """[..., 8 N] codes of 4 bits from [..., N] words, lowest bits first."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    codes = (unsigned[..., None] >> shifts) & 15
    return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)


def _in_blocks(codes: Bytes) -> Bytes:
    return codes.reshape(len(codes), -1, VALUES)


def _nibbles(codes: Bytes) -> Bytes:
    """[R, B, 16] from codes [R, B, 32]."""
    packed: Bytes = codes[..., :16] | (codes[..., 16:] << np.uint8(4))
    return packed


def _half_bytes(values: Floats, where: str) -> Bytes:
    """[R, B, 2] from [R, B]."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    error = np.abs(rounded.astype(np.float32) - values)
    # NaN fails too.
    if not bool((error <= np.maximum(_HALF_ERROR * np.abs(values), _HALF_STEP)).all()):
        raise WeightsError(f"{where}: a scale is not finite, or out of float16's range")
    return rounded[..., None].view(np.uint8)


def _rows(*parts: Bytes) -> Bytes:
    """Blocks from their parts [R, B, n], joined to rows [R, bytes]."""
    blocks = np.concatenate(parts, axis=-1)
    return blocks.reshape(len(blocks), -1)
