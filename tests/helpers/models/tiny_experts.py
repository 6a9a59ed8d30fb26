"""Random experts of one layer as GGML bytes, and cost models, for tests below the level of
models.
"""

from __future__ import annotations

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.policy.costs import CostCurve, CostModel
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix


def matrix(
    rng: np.random.Generator, experts: int, rows: int, columns: int, type_name: str
) -> Matrix:
    values = (rng.standard_normal((experts, rows, columns)) * columns**-0.5).astype(np.float32)
    kind = GGMLQuantizationType[type_name]
    stored = [np.ascontiguousarray(quantize(item, kind)).view(np.uint8).ravel() for item in values]
    stacked = np.concatenate(stored)
    return Matrix(type_name, tuple(stacked.reshape(experts, -1)), stacked)


def layer(
    experts: int = 8,
    hidden: int = 64,
    intermediate: int = 256,
    top_k: int = 2,
    types: tuple[str, str, str] = ("F32", "F32", "F32"),
    seed: int = 0,
    index: int = 0,
) -> LayerWeights:
    """Experts with distinct random weights."""
    rng = np.random.default_rng([seed, index])
    gate = matrix(rng, experts, intermediate, hidden, types[0])
    up = matrix(rng, experts, intermediate, hidden, types[1])
    down = matrix(rng, experts, hidden, intermediate, types[2])
    spec = ExpertSpec(
        hidden,
        intermediate,
        experts,
        top_k,
        *types,
        gate.experts[0].size,
        up.experts[0].size,
        down.experts[0].size,
    )
    return LayerWeights(index, spec, gate, up, down)


def costs(
    cpu_us: float = 400.0,
    accelerator_us: float = 50.0,
    transfer_us: float = 300.0,
    first_us: float = 100.0,
) -> CostModel:
    """A machine where every one of the three lanes is worth using."""
    return CostModel(
        cpu=CostCurve((1, 2, 64), (cpu_us, 1.3 * cpu_us, 20 * cpu_us)),
        cpu_first_us=first_us,
        accelerator=CostCurve((1, 64), (accelerator_us, 2 * accelerator_us)),
        accelerator_first_us=10.0,
        transfer_us=transfer_us,
        link_latency_us=10.0,
        between_layers_us=500.0,
    )
