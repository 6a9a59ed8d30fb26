"""Blocks of 4 and 5 bits written out as Q8_0, to the same values: more bytes, and twice the speed on some CPUs.

ggml's kernels for Q4_0 and Q5_0 take their time for unpacking: 7 GB/s on two threads of an Intel Xeon that read Q8_0 at
21; an AMD EPYC reads Q4_0 at 26 and Q5_0 at 14, Q8_0 at 30 (docs/LOG.md). So it is measured.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.experts.ggml import Ggml, Stored

SLOW_TYPES = ("Q4_0", "Q5_0")


def repacked_bytes(stored: Stored) -> int:
    """Bytes of the matrix in Q8_0."""
    return int(np.prod(stored.shape)) // 32 * 34


def quicker_as_q8_0(ggml: Ggml, threads: int, type_name: str) -> bool:
    """Whether a product with one row takes less time in Q8_0 than as stored; measured once."""
    return ggml.pace("Q8_0", threads).ns < ggml.pace(type_name, threads).ns


def as_q8_0(stored: Stored) -> Stored:
    """The same matrix in Q8_0: each block keeps its scale and its integers, so no value changes."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[stored.type_name]][1]
    blocks = stored.data.reshape(-1, size)
    out = np.empty((len(blocks), 34), np.uint8)
    for start in range(0, len(blocks), 1 << 20):  # in pieces: the steps between take several times a block's size
        part = blocks[start : start + (1 << 20)]
        out[start : start + len(part), :2] = part[:, :2]
        out[start : start + len(part), 2:] = _integers(torch.from_numpy(part.copy()), stored.type_name).numpy()
    return Stored(out.reshape(-1), "Q8_0", stored.shape)


def _integers(blocks: torch.Tensor, type_name: str) -> torch.Tensor:
    """[N, 32] uint8 that are two's complement integers."""
    packed = blocks[:, -16:]
    values = torch.cat((packed & 15, packed >> 4), dim=-1)
    if type_name == "Q4_0":
        return (values.to(torch.int8) - 8).view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8)
    high = ((blocks[:, 2:6, None] >> shifts) & 1).reshape(len(blocks), 32)
    return ((values | (high << 4)).to(torch.int8) - 16).view(torch.uint8)
