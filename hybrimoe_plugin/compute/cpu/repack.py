"""Write matrices of slow types of 4 and 5 bits out as Q8_0, without loss.

Q8_0 takes more bytes but half the time on some CPUs, because ggml's kernels for Q4_0 and Q5_0
spend their time on unpacking: 7 GB/s on two threads of an Intel Xeon that read Q8_0 at 21. An AMD
EPYC reads Q4_0 at 26, Q5_0 at 14 and Q8_0 at 30 (docs/LOG.md). So it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

SLOW_TYPES = ("Q4_0", "Q5_0")

_VALUES = 32
"""Values of a block of Q8_0, Q4_0 and Q5_0."""
_Q8_0_BYTES = 34
"""Bytes of a Q8_0 block: a float16 scale and 32 integers."""
_BLOCKS_AT_A_TIME = 1 << 20
"""The steps between take several times a block's size."""


def repacked_bytes(shape: Sequence[int]) -> int:
    """Bytes of a matrix of this shape in Q8_0."""
    values = math.prod(shape)
    return values // _VALUES * _Q8_0_BYTES


def faster_as_q8_0(ggml: Ggml, threads: int, type_name: str) -> bool:
    """Whether a product with one row takes less time in Q8_0 than as stored; measured once."""
    q8_0 = ggml.kernel_speed("Q8_0", threads)
    stored = ggml.kernel_speed(type_name, threads)
    return q8_0.ns < stored.ns


def as_q8_0(stored: QuantizedMatrix) -> QuantizedMatrix:
    """The same matrix in Q8_0: each block keeps its scale and its integers, so no value changes.

    Args:
        stored: of a type in `SLOW_TYPES`.
    """
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[stored.type_name]]
    blocks = stored.data.reshape(-1, block_bytes)
    out = np.empty((len(blocks), _Q8_0_BYTES), np.uint8)
    for start in range(0, len(blocks), _BLOCKS_AT_A_TIME):
        end = start + _BLOCKS_AT_A_TIME
        part = blocks[start:end]
        integers = _integers(torch.from_numpy(part.copy()), stored.type_name)
        out[start:end, :2] = part[:, :2]
        out[start:end, 2:] = integers.numpy()
    return QuantizedMatrix(out.reshape(-1), "Q8_0", stored.shape)


def _integers(blocks: torch.Tensor, type_name: str) -> torch.Tensor:
    """[N, 32] uint8 that are two's complement integers, of Q4_0 or Q5_0 blocks.

    The last 16 bytes are nibbles; Q5_0 has its fifth bits in 4 bytes behind the scale.
    """
    packed = blocks[:, -16:]
    low = packed & 15
    high = packed >> 4
    codes = torch.cat((low, high), dim=-1)
    zero = 8
    if type_name == "Q5_0":
        zero = 16
        shifts = torch.arange(8, dtype=torch.uint8)
        bits = blocks[:, 2:6, None] >> shifts
        fifth = (bits & 1).reshape(len(blocks), _VALUES)
        codes = codes | (fifth << 4)
    signed = codes.to(torch.int8) - zero
    return signed.view(torch.uint8)
