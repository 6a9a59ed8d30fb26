"""MoE layers with random weights that are as large as a real model's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eval.models.blocks import block_bytes, stored_bytes
from eval.models.shapes import Kinds, Model
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.replay.trace import TraceHeader
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix

SCALES = {
    "Q4_K": ((0, 300.0), (2, 300.0)),
    "Q6_K": ((208, 1400.0),),
    "Q8_0": ((0, 74.0),),
}
"""Type -> (byte of a float16 scale in its block, largest weight over that scale)."""

TINY_SIZE = 64
TINY_KINDS: Kinds = ("Q8_0", "Q8_0", "Q8_0")
"""A dry run's hidden and intermediate size, and types: only the arithmetic is small, routing and
plans are the model's.
"""

RANDOM_BYTES = 1 << 20


def layers_of(model: Model, header: TraceHeader, count: int, tiny: bool) -> list[LayerWeights]:
    """`count` layers, each with bytes of its own, so that caches see as many as in the model."""
    hidden = TINY_SIZE if tiny else model.hidden
    intermediate = TINY_SIZE if tiny else model.intermediate
    made: dict[Kinds, LayerWeights] = {}
    layers = []
    for index in range(count):
        kinds = model.kinds_too if index % 2 else model.kinds
        if tiny:
            kinds = TINY_KINDS
        if kinds not in made:
            made[kinds] = _layer(kinds, hidden, intermediate, header)
        layers.append(_copy(made[kinds], index))
    return layers


def _layer(
    kinds: Kinds,
    hidden: int,
    intermediate: int,
    header: TraceHeader,
) -> LayerWeights:
    """Layer 0 with random weights."""
    rng = np.random.default_rng(0)
    experts = header.experts
    values = hidden * intermediate
    columns = (hidden, hidden, intermediate)
    parts = []
    for kind, width in zip(kinds, columns, strict=True):
        stored = _random(rng, kind, experts * values, width)
        parts.append(_matrix(kind, stored, experts))
    sizes = [stored_bytes(kind, values) for kind in kinds]
    spec = ExpertSpec(
        hidden, intermediate, experts, header.top_k, *kinds, sizes[0], sizes[1], sizes[2]
    )
    gate, up, down = parts
    return LayerWeights(0, spec, gate, up, down)


def _copy(like: LayerWeights, index: int) -> LayerWeights:
    """The same layer in memory of its own, under another index."""
    parts = []
    for part in like.matrices():
        assert part.stacked is not None
        copied = part.stacked.copy()
        parts.append(_matrix(part.type_name, copied, len(part.experts)))
    gate, up, down = parts
    return LayerWeights(index, like.spec, gate, up, down)


def _matrix(kind: str, stored: NDArray[np.uint8], experts: int) -> Matrix:
    """The matrices of all experts, from their stored bytes one after another."""
    return Matrix(kind, tuple(stored.reshape(experts, -1)), stored)


def _random(rng: np.random.Generator, kind: str, values: int, columns: int) -> NDArray[np.uint8]:
    """Random blocks with sound scales: weights of the order 1 / sqrt(columns).

    Args:
        values: in all experts together.
        columns: of one matrix.
    """
    size = stored_bytes(kind, values)
    # One random MiB over and over: the values of the codes change no time.
    codes = rng.integers(0, 256, RANDOM_BYTES, dtype=np.uint8)
    blocks = np.resize(codes, size).reshape(-1, block_bytes(kind))
    for at, largest in SCALES[kind]:
        scale = np.array([columns**-0.5 / largest], np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8)
    return blocks.ravel()
