"""GGML blocks to float32 in torch operations, on any device.

Results equal `gguf.quants.dequantize` to the last bit. Formats: https://github.com/ggml-org/ggml,
src/ggml-common.h. Each conversion takes blocks [N, block bytes] uint8 and returns
[N, block elements] float32.

A Q4_K block, as an example of how they are read, is 144 bytes for 256 values:

    byte  0       2       4                 16                              144
          | d     | dmin  | 8 scales and    | 4 chunks of 32 bytes           |
          | f16   | f16   | 8 minima, 6 bit | each byte: 2 codes of 4 bits   |

The low nibbles of chunk c are the codes of sub-block 2c, its high nibbles those of sub-block
2c + 1. Sub-block s of 32 values is `d * scale[s] * code - dmin * minimum[s]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.blocks.codebook import CONVERSIONS
from hybrimoe_plugin.weights.blocks.fields import constant

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dequantize(raw: torch.Tensor, type_name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 tensor of `shape` from stored bytes [n] uint8, on raw's device.

    Raises:
        BackendError: the type has no conversion here.
    """
    if type_name in _FLOATS:
        values = raw.view(_FLOATS[type_name])
        return values.float().reshape(shape)
    convert = _BLOCKS.get(type_name)
    if convert is None:
        raise BackendError(
            f"no device dequantisation for GGML type {type_name}; there is for {supported()}"
        )
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    blocks = raw.reshape(-1, block_bytes)
    return convert(blocks).reshape(shape)


def supported() -> tuple[str, ...]:
    """The types that `dequantize` converts."""
    return (*_FLOATS, *_BLOCKS)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """[N, 1] float32 from the float16 at byte `at` of each block."""
    pair = blocks[:, at : at + 2]
    return pair.contiguous().view(torch.float16).float()


def _signed_bytes(packed: torch.Tensor) -> torch.Tensor:
    """The same shape in float32: bytes read as two's complement integers."""
    return packed.contiguous().view(torch.int8).float()


def _centred(codes: torch.Tensor, zero: int) -> torch.Tensor:
    """Unsigned codes, of which `zero` stands for 0, as signed float32 values."""
    signed = codes.to(torch.int8) - zero
    return signed.float()


def _nibbles(packed: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """All low nibbles, then all high nibbles, along one dimension."""
    low = packed & 15
    high = packed >> 4
    return torch.cat((low, high), dim=dim)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """[N, 4] bytes -> [N, 32] bits, lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    shifted = packed[:, :, None] >> shifts
    bits = shifted & 1
    return bits.reshape(len(packed), -1)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """34 bytes for 32 values.

    d 2 | int8 codes 32

    value = d * code
    """
    d = _half(blocks, 0)
    codes = _signed_bytes(blocks[:, 2:])
    return codes * d


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """18 bytes for 32 values.

    d 2 | nibbles 16

    value = d * (code - 8)
    """
    d = _half(blocks, 0)
    codes = _nibbles(blocks[:, 2:])
    return _centred(codes, 8) * d


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """20 bytes for 32 values.

    d 2 | m 2 | nibbles 16

    value = d * code + m
    """
    d = _half(blocks, 0)
    m = _half(blocks, 2)
    codes = _nibbles(blocks[:, 4:])
    return codes.float() * d + m


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """22 bytes for 32 values.

    d 2 | fifth bits 4 | nibbles 16

    value = d * (code - 16)
    """
    d = _half(blocks, 0)
    fifth_bits = _bits(blocks[:, 2:6])
    codes = _nibbles(blocks[:, 6:])
    codes = codes | (fifth_bits << 4)
    return _centred(codes, 16) * d


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    """24 bytes for 32 values.

    d 2 | m 2 | fifth bits 4 | nibbles 16

    value = d * code + m
    """
    d = _half(blocks, 0)
    m = _half(blocks, 2)
    fifth_bits = _bits(blocks[:, 4:8])
    codes = _nibbles(blocks[:, 8:])
    codes = codes | (fifth_bits << 4)
    return codes.float() * d + m


def _scales_and_minima(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight 6-bit scales and minima, each [N, 8, 1] float32, of a K block's 12 bytes.

    Byte i (0 to 3) holds scale i, byte 4 + i minimum i, both in their lower 6 bits. Byte 8 + i
    holds the lower 4 bits of scale 4 + i and, above them, of minimum 4 + i. The upper 2 bits of
    those are the upper 2 bits of byte i and of byte 4 + i.
    """
    first = packed[:, 0:4]
    second = packed[:, 4:8]
    third = packed[:, 8:12]
    last_scales = (third & 15) | ((first >> 2) & 48)
    last_minima = (third >> 4) | ((second >> 2) & 48)
    scales = torch.cat((first & 63, last_scales), dim=-1)
    minima = torch.cat((second & 63, last_minima), dim=-1)
    return scales.float()[:, :, None], minima.float()[:, :, None]


def _scaled_sub_blocks(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """[N, 256] from the codes [N, 8, 32] of eight sub-blocks.

    value = d * scale * code - dmin * minimum
    """
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    d = _half(blocks, 0)[:, :, None]
    dmin = _half(blocks, 2)[:, :, None]
    scales = d * scales
    minima = dmin * minima
    values = scales * codes.float() - minima
    return values.reshape(len(blocks), 256)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """144 bytes for 256 values, drawn at the top of this file.

    d 2 | dmin 2 | scales and minima 12 | nibbles 128
    """
    chunks = blocks[:, 16:].reshape(-1, 4, 1, 32)
    codes = _nibbles(chunks, dim=2)
    return _scaled_sub_blocks(blocks, codes.reshape(-1, 8, 32))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    """176 bytes for 256 values.

        d 2 | dmin 2 | scales and minima 12 | fifth bits 32 | nibbles 128

    Bit s of byte i of the fifth bits belongs to value i of sub-block s.
    """
    chunks = blocks[:, 48:].reshape(-1, 4, 1, 32)
    low = _nibbles(chunks, dim=2)
    low = low.reshape(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    fifth_bits = blocks[:, 16:48][:, None, :]
    high = (fifth_bits >> shifts[:, None]) & 1
    return _scaled_sub_blocks(blocks, low | (high << 4))


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """210 bytes for 256 values.

        nibbles 128 | upper bit pairs 64 | int8 scales 16 | d 2

    value = d * scale * (code - 32), one scale for 16 values. Each half of 128 values has 64 bytes
    of nibbles, whose low ones come first, and 32 bytes with the bit pairs of its four quarters.
    """
    halves = blocks[:, 0:128].reshape(-1, 2, 1, 64)
    low = _nibbles(halves, dim=2)
    low = low.reshape(-1, 8, 32)
    shifts = constant((0, 2, 4, 6), torch.uint8, blocks.device)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = (pairs >> shifts[:, None]) & 3
    high = high.reshape(-1, 8, 32)
    codes = low | (high << 4)
    values = _centred(codes, 32)
    values = values.reshape(-1, 16, 16)
    scales = _half(blocks, 208) * _signed_bytes(blocks[:, 192:208])
    scaled = scales[:, :, None] * values
    return scaled.reshape(-1, 256)


_BLOCKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    **CONVERSIONS,
}
