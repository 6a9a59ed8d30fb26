"""MXFP4 as Q5_0, without loss: the same bytes a value as far as codes go, and 5 bits for 4.

A value of MXFP4 is one of 0, 1, 2, 3, 4, 6, 8, 12 with a sign, times a power of two; a value of
Q5_0 is an integer from -16 to 15 times a float16. Both keep values j and j + 16 of a block in one
byte:

    MXFP4   exponent 1 | nibbles 16                    17 bytes for 32 values
    Q5_0    d 2 | fifth bits 4 | nibbles 16            22 bytes
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hybrimoe_plugin.errors import BackendError

_EXPONENT_OF_ONE = 128
"""The stored exponent for which codes are the values themselves."""
_SMALLEST, _LARGEST = -24, 15
"""Exponents of the powers of two that a float16 holds."""
_INTEGERS = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
_CODES = 16 + np.concatenate((_INTEGERS, -_INTEGERS)).astype(np.uint8)
"""[16] the 5-bit code of each nibble."""
_BYTES = np.arange(256, dtype=np.uint8)
_LOW, _HIGH = _CODES[_BYTES & 15], _CODES[_BYTES >> 4]
_NIBBLES = (_LOW & 15) | ((_HIGH & 15) << 4)
"""[256] what becomes of a byte of nibbles."""


def as_q5_0(stored: NDArray[np.uint8], made: NDArray[np.uint8]) -> None:
    """Write blocks of MXFP4 as blocks of Q5_0.

    Values below 2^-24 are the only ones that are rounded, to a multiple of that.

    Args:
        stored: 1-D, whole blocks.
        made: 1-D, for as many blocks. Mutates.

    Raises:
        BackendError: a scale beyond the range of float16.
    """
    blocks, target = stored.reshape(-1, 17), made.reshape(-1, 22)
    exponents = blocks[:, 0].astype(np.int16) - _EXPONENT_OF_ONE
    if exponents.max(initial=0) > _LARGEST:
        raise BackendError("weights in MXFP4 are beyond the range of Q5_0, and MXFP4 has no kernel")
    scales = np.ldexp(np.float32(1), np.maximum(exponents, _SMALLEST)).astype(np.float16)
    nibbles = blocks[:, 1:]
    target[:, 0:2] = scales.view(np.uint8).reshape(-1, 2)
    target[:, 6:] = _NIBBLES[nibbles]
    fifth = np.concatenate((_LOW[nibbles] >> 4, _HIGH[nibbles] >> 4), axis=1)
    target[:, 2:6] = np.packbits(fifth, axis=1, bitorder="little")
    tiny = exponents < _SMALLEST
    if tiny.any():
        _round_tiny(nibbles[tiny], exponents[tiny], target, tiny)


def _round_tiny(
    nibbles: NDArray[np.uint8],
    exponents: NDArray[np.int16],
    target: NDArray[np.uint8],
    rows: NDArray[np.bool_],
) -> None:
    """Codes of blocks whose scale float16 does not hold, as multiples of the smallest one."""
    codes = np.concatenate((_CODES[nibbles & 15], _CODES[nibbles >> 4]), axis=1)
    integers = codes.astype(np.float32) - 16
    smaller = np.ldexp(integers, (exponents - _SMALLEST)[:, None].astype(np.int32))
    codes = (np.rint(smaller) + 16).astype(np.uint8)
    low, high = codes[:, :16], codes[:, 16:]
    target[rows, 6:] = (low & 15) | ((high & 15) << 4)
    target[rows, 2:6] = np.packbits(codes >> 4, axis=1, bitorder="little")
