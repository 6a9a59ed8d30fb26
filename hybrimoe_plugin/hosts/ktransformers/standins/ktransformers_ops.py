"""`KTransformersOps` in torch: dequantises GGML blocks on the device; Marlin is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.dequant import dequantize, supported
from hybrimoe_plugin.weights.gguf_store import dequantize_bytes

MARLIN = (
    "KLinearMarlin needs KTransformersOps, which was not compiled here: put KLinearTorch into the "
    "rules' generate_op, or use the rules in optimize_rules/ktransformers"
)


def gptq_marlin_gemm(*_arguments: Any) -> torch.Tensor:
    """Raises: BackendError: always."""
    raise BackendError(MARLIN)


def _make(type_name: str) -> Callable[[torch.Tensor, int, torch.device], torch.Tensor]:
    def dequantize_type(data: torch.Tensor, block_bytes: int, device: torch.device) -> torch.Tensor:
        """Float32 [n] on `device` from stored bytes."""
        raw = data.contiguous().view(torch.uint8).reshape(-1)
        if type_name in supported():
            return dequantize(raw.to(device), type_name, (-1,))
        # Rare types are computed on the CPU, once, while the model loads.
        count = _values(type_name, raw.numel())
        return dequantize_bytes(np.asarray(raw.cpu().numpy()), type_name, (count,)).to(device)

    return dequantize_type


def _values(type_name: str, size: int) -> int:
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return size // block_bytes * block


dequantize_q8_0 = _make("Q8_0")
dequantize_q2_k = _make("Q2_K")
dequantize_q3_k = _make("Q3_K")
dequantize_q4_k = _make("Q4_K")
dequantize_q5_k = _make("Q5_K")
dequantize_q6_k = _make("Q6_K")
dequantize_iq4_xs = _make("IQ4_XS")
