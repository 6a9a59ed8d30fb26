"""Random matrices of any GGML type."""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix

FLOATS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

SCALES = {
    "Q4_0": (0,),
    "Q5_0": (0,),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
"""Bytes at which a block keeps its float16 scales: random ones there could be infinite."""


def random_matrix(type_name: str, rows: int, columns: int, seed: int = 0) -> QuantizedMatrix:
    """Random values, or random codes with small scales."""
    rng = np.random.default_rng(seed)
    shape = (rows, columns)
    if type_name in FLOATS:
        values = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        stored = values.to(FLOATS[type_name])
        data = stored.view(torch.uint8).numpy()
        return QuantizedMatrix(data.ravel(), type_name, shape)
    kind = GGMLQuantizationType[type_name]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    count = rows * columns // block
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    for at in SCALES[type_name]:
        scales = rng.uniform(1e-3, 2e-3, count)
        stored_scales = scales.astype(np.float16).view(np.uint8)
        blocks[:, at : at + 2] = stored_scales.reshape(-1, 2)
    return QuantizedMatrix(blocks.ravel(), type_name, shape)
