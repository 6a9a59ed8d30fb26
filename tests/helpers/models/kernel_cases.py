"""Random experts in any GGML type, as weights of a layer; what the kernels are judged on is in
`eval.kernel_cases`.
"""

from __future__ import annotations

import numpy as np
import torch

from eval.kernel_cases.data import random_stored
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix


def random_matrix(
    rng: np.random.Generator, experts: int, rows: int, columns: int, kind: str
) -> Matrix:
    """Random stored bytes with scales such that weights are of the order 1 / sqrt(columns)."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    stored = random_stored(kind, experts, rows, columns, generator).numpy()
    return Matrix(kind, tuple(stored), stored.ravel())


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
    return LayerWeights(
        index, ExpertSpec(hidden, intermediate, experts, top_k, *kinds, *sizes), gate, up, down
    )


def random_call(
    tokens: int, experts: int, hidden: int, top_k: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [T, H], ids [T, K], routing weights [T, K])."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    return (
        torch.randn(tokens, hidden, generator=generator),
        ids,
        torch.rand(tokens, top_k, generator=generator),
    )


def reference(
    weights: LayerWeights,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    routing: torch.Tensor,
    mine: set[int],
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
