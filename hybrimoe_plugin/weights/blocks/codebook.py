"""Conversions of the types whose codes stand for entries of a table, and of those below 4 bits.

As in `weights.dequant`: blocks [N, block bytes] uint8 become [N, block elements] float32, equal to
`gguf.quants` to the last bit. The tables are those of the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from gguf import quants

from hybrimoe_plugin.weights.blocks.fields import half, shifted, signs, strided, words


@cache
def grid(type_name: str) -> torch.Tensor:
    """[entries, values of an entry] float32 on the CPU: what the codes of an IQ type stand for."""
    kind: Any = getattr(quants, type_name)
    kind.init_grid()
    return torch.from_numpy(kind.grid.reshape(kind.grid_shape).astype(np.float32))


@cache
def points(type_name: str) -> torch.Tensor:
    """[16] float32 on the CPU: what the codes of a 4-bit type with a table stand for."""
    kind: Any = getattr(quants, type_name)
    return torch.tensor(kind.kvalues, dtype=torch.float32)


@cache
def byte_scales(type_name: str) -> torch.Tensor:
    """[256] float32 on the CPU: the scale that each byte stands for, of MXFP4 and NVFP4."""
    kind: Any = getattr(quants, type_name)
    read = kind.e8m0_to_fp32_half if type_name == "MXFP4" else kind.ue4m3_to_fp32
    return torch.from_numpy(read(np.arange(256, dtype=np.uint8)).astype(np.float32))


@cache
def sign_bytes() -> torch.Tensor:
    """[128] uint8 on the CPU: eight signs of an even number of minuses, from the first seven."""
    kind: Any = quants.IQ2_XXS
    return torch.frombuffer(bytearray(kind.ksigns), dtype=torch.uint8)


@cache
def _beside(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """One of the tables above on a device, kept (see `fields.constant`)."""
    return table.to(device)


def _look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The table's entries, flat for each block: [N, values]."""
    found = _beside(table, codes.device)[codes.long()]
    return found.reshape(len(codes), -1)


def _scaled(scales: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[N, values]: each scale of [N, n] times its share of the values."""
    count, parts = scales.shape
    return (scales[:, :, None] * values.reshape(count, parts, -1)).reshape(count, -1)


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """17 bytes for 32 values: exponent 1 | nibbles 16."""
    scales = _look_up(byte_scales("MXFP4"), blocks[:, 0:1])
    return scales * _look_up(points("MXFP4"), strided(blocks[:, 1:], 16, (0, 4), 15))


def _nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    """36 bytes for 64 values: scales 4 | nibbles 32; a scale for 16 values."""
    scales = _look_up(byte_scales("NVFP4"), blocks[:, 0:4])
    return _scaled(scales, _look_up(points("NVFP4"), strided(blocks[:, 4:], 8, (0, 4), 15)))


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    """18 bytes for 32 values: d 2 | nibbles 16."""
    return half(blocks, 0) * _look_up(points("IQ4_NL"), strided(blocks[:, 2:], 16, (0, 4), 15))


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    """136 bytes for 256 values: d 2 | upper scale bits 2 | lower ones 4 | nibbles 128."""
    upper = shifted(words(blocks[:, 2:4], 2), tuple(range(0, 16, 2)), 3).reshape(len(blocks), 8)
    lower = shifted(blocks[:, 4:8], (0, 4), 15).reshape(len(blocks), 8)
    scales = half(blocks, 0) * ((lower | (upper << 4)) - 32).float()
    return _scaled(scales, _look_up(points("IQ4_NL"), strided(blocks[:, 8:], 16, (0, 4), 15)))


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """84 bytes for 256 values: scales and minima 16 | bit pairs 64 | d 2 | dmin 2."""
    scales = half(blocks, 80) * (blocks[:, 0:16] & 15).float()
    minima = half(blocks, 82) * (blocks[:, 0:16] >> 4).float()
    codes = strided(blocks[:, 16:80], 32, (0, 2, 4, 6), 3).float()
    values = scales[:, :, None] * codes.reshape(-1, 16, 16) - minima[:, :, None]
    return values.reshape(len(blocks), 256)


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """110 bytes for 256 values: third bits 32 | bit pairs 64 | scales 12 | d 2.

    A third bit that is 0 takes 4 off the code.
    """
    lower = strided(blocks[:, 96:104], 8, (0, 4), 15)
    upper = strided(blocks[:, 104:108], 4, (0, 2, 4, 6), 3)
    scales = half(blocks, 108) * ((lower | (upper << 4)).float() - 32)
    pairs = strided(blocks[:, 32:96], 32, (0, 2, 4, 6), 3)
    third = strided(blocks[:, 0:32], 32, tuple(range(8)), 1)
    return _scaled(scales, (pairs | (third << 2)).float() - 4)


def _half_steps(d: torch.Tensor, scales: torch.Tensor, factor: float) -> torch.Tensor:
    """d * (scale + 1/2) * factor, [N, n]."""
    return d * (0.5 + scales.float()) * factor


def _indexed_signs(packed: torch.Tensor) -> torch.Tensor:
    """[N, 32 n] from the four 7-bit sign codes in each word [N, n]."""
    codes = shifted(packed, (0, 7, 14, 21), 127).reshape(len(packed), -1)
    return signs(_look_up(sign_bytes(), codes))


def _iq2_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """66 bytes for 256 values: d 2 | 8 times (codes 4 | signs and scale 4)."""
    parts = blocks[:, 2:].reshape(len(blocks), 8, 8)
    packed = words(parts[:, :, 4:].reshape(len(blocks), 32), 4)
    scales = _half_steps(half(blocks, 0), packed >> 28, 0.25)
    values = _look_up(grid("IQ2_XXS"), parts[:, :, :4].reshape(len(blocks), 32))
    return _scaled(scales, values) * _indexed_signs(packed)


def _nibble_scales(packed: torch.Tensor) -> torch.Tensor:
    """[N, 2 n] from bytes [N, n], the low nibble of each first."""
    return shifted(packed, (0, 4), 15).reshape(len(packed), -1)


def _iq2_xs(blocks: torch.Tensor) -> torch.Tensor:
    """74 bytes for 256 values: d 2 | words of code and sign code 64 | scales 8."""
    packed = words(blocks[:, 2:66], 2)
    scales = _half_steps(half(blocks, 0), _nibble_scales(blocks[:, 66:74]), 0.25)
    values = _look_up(grid("IQ2_XS"), packed & 511)
    return _scaled(scales, values) * signs(_look_up(sign_bytes(), packed >> 9))


def _iq2_s(blocks: torch.Tensor) -> torch.Tensor:
    """82 bytes for 256 values: d 2 | codes 32 | signs 32 | upper code bits 8 | scales 8."""
    upper = shifted(blocks[:, 66:74], (0, 2, 4, 6), 3).reshape(len(blocks), 32)
    scales = _half_steps(half(blocks, 0), _nibble_scales(blocks[:, 74:82]), 0.25)
    values = _look_up(grid("IQ2_S"), blocks[:, 2:34].long() | (upper.long() << 8))
    return _scaled(scales, values) * signs(blocks[:, 34:66])


def _iq3_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """98 bytes for 256 values: d 2 | codes 64 | signs and scales 32."""
    packed = words(blocks[:, 66:98], 4)
    scales = _half_steps(half(blocks, 0), packed >> 28, 0.5)
    return _scaled(scales, _look_up(grid("IQ3_XXS"), blocks[:, 2:66])) * _indexed_signs(packed)


def _iq3_s(blocks: torch.Tensor) -> torch.Tensor:
    """110 bytes for 256 values: d 2 | codes 64 | upper code bits 8 | signs 32 | scales 4."""
    upper = shifted(blocks[:, 66:74], tuple(range(8)), 1).reshape(len(blocks), 64)
    scales = half(blocks, 0) * (1 + 2 * _nibble_scales(blocks[:, 106:110]).float())
    values = _look_up(grid("IQ3_S"), blocks[:, 2:66].long() | (upper.long() << 8))
    return _scaled(scales, values) * signs(blocks[:, 74:106])


def _shifted_grid(codes: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """[N, 256] IQ1 grid values of codes [N, 32], an eighth up or, where `minus`, down."""
    kind: Any = quants.IQ1_S
    entries = _beside(grid("IQ1_S"), codes.device)[codes]
    steps = kind.delta * (1 - 2 * minus.float())
    return (entries + steps.reshape(len(codes), 32, 1)).reshape(len(codes), -1)


def _iq1_s(blocks: torch.Tensor) -> torch.Tensor:
    """50 bytes for 256 values: d 2 | codes 32 | words of upper code bits, scale and side 16."""
    packed = words(blocks[:, 34:50], 2)
    scales = half(blocks, 0) * (2 * ((packed >> 12) & 7) + 1).float()
    upper = shifted(packed, (0, 3, 6, 9), 7).reshape(len(blocks), 32)
    minus = (packed >> 15).repeat_interleave(4, dim=1)
    return _scaled(scales, _shifted_grid(blocks[:, 2:34].long() | (upper << 8), minus))


def _iq1_m(blocks: torch.Tensor) -> torch.Tensor:
    """56 bytes for 256 values: codes 32 | upper code bits and sides 16 | scales 8.

    The top four bits of the scales' four words are the float16 d.
    """
    packed = words(blocks[:, 48:56], 2)
    places = 4 * torch.arange(4, device=blocks.device)
    d = ((packed >> 12) << places).sum(dim=1, keepdim=True)
    low_and_high = torch.cat((d & 255, d >> 8), dim=1).to(torch.uint8)
    small = shifted(packed, (0, 3, 6, 9), 7).reshape(len(blocks), 16)
    scales = half(low_and_high, 0) * (2 * small + 1).float()
    upper = shifted(blocks[:, 32:48], (0, 4), 15).reshape(len(blocks), 32).long()
    codes = blocks[:, 0:32].long() | ((upper & 7) << 8)
    return _scaled(scales, _shifted_grid(codes, upper >> 3))


def _ternary(blocks: torch.Tensor, run: slice, width: int, digits: int) -> torch.Tensor:
    """[N, values] of -1, 0, 1: base-3 digits of bytes, as fractions of 256."""
    packed = blocks[:, run].reshape(len(blocks), -1, 1, width).int()
    powers = 3 ** torch.arange(digits, dtype=torch.int32, device=blocks.device)
    codes = (((packed * powers[:, None]) & 255) * 3) >> 8
    return codes.reshape(len(blocks), -1).float() - 1


def _tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    """54 bytes for 256 values: five digits in each of 48 bytes, four in each of 4 | d 2."""
    parts = (
        _ternary(blocks, slice(0, 32), 32, 5),
        _ternary(blocks, slice(32, 48), 16, 5),
        _ternary(blocks, slice(48, 52), 4, 4),
    )
    return half(blocks, 52) * torch.cat(parts, dim=1)


def _tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    """66 bytes for 256 values: bit pairs 64 | d 2."""
    return half(blocks, 64) * (strided(blocks[:, 0:64], 32, (0, 2, 4, 6), 3).float() - 1)


CONVERSIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}
