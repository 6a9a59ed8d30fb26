"""Random experts in any GGML type."""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.experts.weights import LayerWeights, Matrix

SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,)}
"""Bytes at which a block keeps float16 scales: random ones would often not be finite."""


def random_matrix(rng: np.random.Generator, experts: int, rows: int, columns: int, kind: str) -> Matrix:
    """Random stored bytes with scales such that weights are of the order 1 / sqrt(columns)."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if kind in ("F16", "BF16", "F32"):
        values = torch.from_numpy(rng.standard_normal((experts, rows * columns)) * columns**-0.5)
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]
        stored = values.to(dtype).view(torch.uint8).numpy()
    else:
        blocks = rng.integers(0, 256, (experts, rows * columns // block, size), dtype=np.uint8)
        spread = {"Q4_K": 300.0, "Q5_K": 600.0, "Q6_K": 1400.0, "Q8_0": 74.0, "Q4_0": 4.6}[kind]
        for at in SCALES[kind]:
            scales = rng.uniform(0.5, 1.5, blocks.shape[:2]) * columns**-0.5 / spread
            blocks[:, :, at : at + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
        stored = blocks.reshape(experts, -1)
    stacked = np.ascontiguousarray(stored).ravel()
    return Matrix(kind, tuple(stacked.reshape(experts, -1)), stacked)


def random_layer(
    kinds: tuple[str, str, str],
    hidden: int = 256,
    intermediate: int = 256,
    experts: int = 4,
    top_k: int = 2,
    seed: int = 0,
    index: int = 0,
) -> LayerWeights:
    rng = np.random.default_rng([seed, index])
    gate = random_matrix(rng, experts, intermediate, hidden, kinds[0])
    up = random_matrix(rng, experts, intermediate, hidden, kinds[1])
    down = random_matrix(rng, experts, hidden, intermediate, kinds[2])
    sizes = (gate.experts[0].size, up.experts[0].size, down.experts[0].size)
    return LayerWeights(index, ExpertSpec(hidden, intermediate, experts, top_k, *kinds, *sizes), gate, up, down)


def random_call(
    tokens: int, experts: int, hidden: int, top_k: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [T, H], ids [T, K], routing weights [T, K])."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    return torch.randn(tokens, hidden, generator=generator), ids, torch.rand(tokens, top_k, generator=generator)


def reference(
    weights: LayerWeights, hidden: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor, mine: set[int]
) -> torch.Tensor:
    """Token by token, expert by expert, on gguf's own dequantisation; float64."""
    output = torch.zeros(hidden.shape, dtype=torch.float64)
    states = hidden.double()
    for expert in mine:
        gate, up, down = weights.dequantized(expert, torch.float64)
        for token, place in (ids == expert).nonzero().tolist():
            inner = torch.nn.functional.silu(gate @ states[token]) * (up @ states[token])
            output[token] += routing[token, place].double() * (down @ inner)
    return output


def rms_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-12))
