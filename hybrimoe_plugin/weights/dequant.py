"""GGML blocks to float32 in torch operations, on any device; equal to `gguf.quants.dequantize` to
the last bit.

Formats: https://github.com/ggml-org/ggml, src/ggml-common.h. Each function takes [N, block bytes]
uint8 and returns [N, block elements] float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.errors import BackendError


def dequantize(raw: torch.Tensor, type_name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 tensor of `shape` from stored bytes [n] uint8, on raw's device.

    Raises:
        BackendError: no such conversion.
    """
    if type_name == "F32":
        return raw.view(torch.float32).reshape(shape)
    if type_name in ("F16", "BF16"):
        return (
            raw.view(torch.float16 if type_name == "F16" else torch.bfloat16).float().reshape(shape)
        )
    if type_name not in _BLOCKS:
        raise BackendError(
            f"no device dequantisation for GGML type {type_name}; there is for {supported()}"
        )
    block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][1]
    return _BLOCKS[type_name](raw.reshape(-1, block_bytes)).reshape(shape)


def supported() -> tuple[str, ...]:
    """The types that `dequantize` takes."""
    return ("F32", "F16", "BF16", *_BLOCKS)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """[N, 1] float32 from the float16 at byte `at`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Low nibbles, then high nibbles, along the last dimension."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """[N, 4] bytes -> [N, 32] bits, lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts) & 1).reshape(len(packed), -1)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return (_nibbles(blocks[:, 2:]).to(torch.int8) - 8).float() * _half(blocks, 0)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    values = _nibbles(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << 4)
    return (values.to(torch.int8) - 16).float() * _half(blocks, 0)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    values = _nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4)
    return values.float() * _half(blocks, 0) + _half(blocks, 2)


def _scales_and_mins(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eight 6-bit scales and minima [N, 8, 1] of a K block's 12 bytes."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=-1)
    mins = torch.cat((middle & 63, (high >> 4) | ((middle >> 2) & 48)), dim=-1)
    return scales.float()[:, :, None], mins.float()[:, :, None]


def _k_affine(blocks: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """d * scale * value - dmin * min over eight sub-blocks; values [N, 8, 32]."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    scales = _half(blocks, 0)[:, :, None] * scales
    mins = _half(blocks, 2)[:, :, None] * mins
    return (scales * values.float() - mins).reshape(len(blocks), 256)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    values = torch.cat((packed & 15, packed >> 4), dim=2).reshape(-1, 8, 32)
    return _k_affine(blocks, values)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    packed = blocks[:, 48:].reshape(-1, 4, 1, 32)
    low = torch.cat((packed & 15, packed >> 4), dim=2).reshape(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 16:48][:, None, :] >> shifts) & 1
    return _k_affine(blocks, low | (high << 4))


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = blocks[:, 0:128].reshape(-1, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), dim=2).reshape(-1, 8, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, 8, 32)
    values = (low | (high << 4)).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    scales = (_half(blocks, 208) * scales)[:, :, None]
    return (scales * values.reshape(-1, 16, 16).float()).reshape(-1, 256)


_BLOCKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
