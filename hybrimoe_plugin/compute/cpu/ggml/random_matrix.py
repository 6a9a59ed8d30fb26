"""Random stored matrices of any type that ggml computes."""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_SCALES_AT: dict[str, tuple[int, ...]] = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
"""Bytes at which a block keeps its float16 scales, where that is not at its beginning alone.

Random bits there could be infinite.
"""
_SCALES = 1e-3, 2e-3


def random_matrix(type_name: str, shape: tuple[int, ...], seed: int = 0) -> QuantizedMatrix:
    """Random values, or random codes with small scales."""
    rng = np.random.default_rng(seed)
    if type_name in _FLOATS:
        values = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        stored = values.to(_FLOATS[type_name])
        return QuantizedMatrix(stored.view(torch.uint8).numpy().ravel(), type_name, shape)
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    count = int(np.prod(shape)) // block
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    if type_name == "IQ1_M":
        _put_scattered(blocks, _scales(rng, count))
    else:
        for at in _SCALES_AT.get(type_name, (0,)):
            blocks[:, at : at + 2] = _scales(rng, count).view(np.uint8).reshape(-1, 2)
    return QuantizedMatrix(blocks.ravel(), type_name, shape)


def _scales(rng: np.random.Generator, count: int) -> NDArray[np.float16]:
    return rng.uniform(*_SCALES, count).astype(np.float16)


def _put_scattered(blocks: NDArray[np.uint8], scales: NDArray[np.float16]) -> None:
    """IQ1_M keeps four bits of its scale at the top of each of the last four words."""
    bits = scales.view(np.uint16)
    for part in range(4):
        nibble = ((bits >> (4 * part)) & 15).astype(np.uint8)
        top = blocks[:, 49 + 2 * part]
        top &= 15
        top |= nibble << 4
