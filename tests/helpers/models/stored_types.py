"""Tiny models as GGUF files whose matrices are of any type that gguf reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from hybrimoe_plugin.hosts.transformers import gguf_export

_SCALES: dict[str, tuple[int, ...]] = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Bytes at which a block keeps its float16 scales."""
_HALF_A_SCALE = {"IQ1_M": (48, 8), "MXFP4": (0, 1), "NVFP4": (0, 4)}
"""The same of types whose scales are not float16: (first byte, bytes)."""
_WRITTEN_BY_GGUF = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("TQ1_0", "TQ2_0"),
)

KINDS = tuple(
    name
    for name in (*_WRITTEN_BY_GGUF, *_SCALES, *_HALF_A_SCALE)
    if name in GGMLQuantizationType.__members__
)
"""Every type of weights that gguf reads; an older release names fewer."""


def stored(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Stored rows: of these values where gguf writes the type, else random codes of their size."""
    if kind.name in _WRITTEN_BY_GGUF:
        return quantize(values, kind)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.size)
    blocks = rng.integers(0, 256, (values.size // block, block_bytes), dtype=np.uint8)
    if kind.name in _SCALES:
        _set_scales(blocks, kind, float(values.std()))
    else:
        _set_other_scales(blocks, kind)
    return blocks.reshape(*values.shape[:-1], -1)


def _set_scales(blocks: NDArray[np.uint8], kind: GGMLQuantizationType, deviation: float) -> None:
    """Scales that give the values about this standard deviation. Mutates: `blocks`."""

    def scale(value: float) -> None:
        for at in _SCALES[kind.name]:
            blocks[:, at : at + 2] = np.full(1, value, np.float16).view(np.uint8)

    scale(1.0)
    scale(deviation / float(dequantize(blocks, kind).std()))


def _set_other_scales(blocks: NDArray[np.uint8], kind: GGMLQuantizationType) -> None:
    """Scales that give values of about 1/16. Mutates: `blocks`."""
    first, count = _HALF_A_SCALE[kind.name]
    part = blocks[:, first : first + count]
    if kind.name == "IQ1_M":  # the top nibbles of four words are the scale: 0x2000 is 2^-7
        words = part.view(np.uint16)
        words &= 0x0FFF
        words[:, 3] |= 0x2000
    elif kind.name == "MXFP4":
        part[:] = 128 - 6  # a code of 2 stands for 2^(byte - 127)
    else:
        part[:] = (7 - 6) << 3  # 2^-6, in four bits of exponent


def write(
    folder: Path, family: str, kind_of: Callable[[str], str], changes: dict[str, Any]
) -> Path:
    """Write a tiny model with even routers, so that rounding does not decide who computes.

    Args:
        kind_of: GGUF tensor name -> GGML type name, of matrices.
        changes: to the model's config.
    """
    model = tiny.model(family, **changes)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(".gate.weight"):
                value *= 0.2
    path = folder / "model.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_export, "quantize", stored)
        gguf_export.export_gguf(model, path, types=kind_of)
    return path
