"""Matrices written out as Q8_0: blocks of 4 and 5 bits, to the same values, and types that have no
kernel.

The former take more bytes and half the time on some CPUs: ggml's kernels for Q4_0 and Q5_0 take
their time for unpacking: 7 GB/s on two threads of an Intel Xeon that read Q8_0 at 21; an AMD EPYC
reads Q4_0 at 26 and Q5_0 at 14, Q8_0 at 30 (docs/LOG.md). So it is measured.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.weights.gguf_store import dequantize_bytes
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

SLOW_TYPES = ("Q4_0", "Q5_0")


def repacked_bytes(stored: QuantizedMatrix) -> int:
    """Bytes of the matrix in Q8_0."""
    return int(np.prod(stored.shape)) // 32 * 34


def quicker_as_q8_0(ggml: Ggml, threads: int, type_name: str) -> bool:
    """Whether a product with one row takes less time in Q8_0 than as stored; measured once."""
    return ggml.pace("Q8_0", threads).ns < ggml.pace(type_name, threads).ns


def as_q8_0(stored: QuantizedMatrix) -> QuantizedMatrix:
    """The same matrix in Q8_0: each block keeps its scale and its integers, so no value changes."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[stored.type_name]][1]
    blocks = stored.data.reshape(-1, size)
    out = np.empty((len(blocks), 34), np.uint8)
    for start in range(
        0, len(blocks), 1 << 20
    ):  # in pieces: the steps between take several times a block's size
        part = blocks[start : start + (1 << 20)]
        out[start : start + len(part), :2] = part[:, :2]
        out[start : start + len(part), 2:] = _integers(
            torch.from_numpy(part.copy()), stored.type_name
        ).numpy()
    return QuantizedMatrix(out.reshape(-1), "Q8_0", stored.shape)


def requantised(stored: QuantizedMatrix) -> QuantizedMatrix:
    """A matrix in a type without a kernel, in Q8_0, or in F32 where rows are no whole blocks of 32.

    Raises:
        WeightsError: the type cannot be dequantised.
    """
    columns = stored.shape[-1]
    kind = GGMLQuantizationType.Q8_0 if columns % 32 == 0 else GGMLQuantizationType.F32
    rows = stored.data.reshape(-1, stored.nbytes // (int(np.prod(stored.shape)) // columns))
    made = []
    for start in range(
        0, len(rows), 4096
    ):  # in pieces: the float32 values of all take four times the result
        part = rows[start : start + 4096]
        values = dequantize_bytes(part.reshape(-1), stored.type_name, (len(part), columns)).numpy()
        made.append(quantize(values, kind).view(np.uint8).reshape(-1))
    return QuantizedMatrix(np.concatenate(made), kind.name, stored.shape)


def _integers(blocks: torch.Tensor, type_name: str) -> torch.Tensor:
    """[N, 32] uint8 that are two's complement integers."""
    packed = blocks[:, -16:]
    values = torch.cat((packed & 15, packed >> 4), dim=-1)
    if type_name == "Q4_0":
        return (values.to(torch.int8) - 8).view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8)
    high = ((blocks[:, 2:6, None] >> shifts) & 1).reshape(len(blocks), 32)
    return ((values | (high << 4)).to(torch.int8) - 16).view(torch.uint8)
