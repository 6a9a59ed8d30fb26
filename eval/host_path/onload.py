"""What sending one expert into a slot costs the host."""

from __future__ import annotations

from time import perf_counter_ns

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from eval.host_path.subject import DEVICE, Subject, make_free_accelerator
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix

TYPES = ("Q4_K", "Q6_K")
"""One that is copied as it is, and one that is rearranged into planes on arrival."""
EXPERTS = 16
SLOTS = 8


def times(subject: Subject, type_name: str, count: int) -> list[float]:
    """Times in us of onloads into slots that were computed with before."""
    weights = zeros(subject.engine.layers[0].spec, type_name)
    accelerator = make_free_accelerator()
    accelerator.allocate(SLOTS, [weights])
    hidden = torch.empty(1, weights.spec.hidden, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    shares = torch.zeros(1, 1, device=DEVICE)
    found = []
    for turn in range(count + SLOTS):
        slot, expert = turn % SLOTS, turn % EXPERTS
        started = perf_counter_ns()
        accelerator.onload(slot, weights, expert)
        found.append((perf_counter_ns() - started) / 1e3)
        accelerator.compute((slot,), hidden, ids, shares)
    accelerator.close()
    return found[SLOTS:]


def zeros(shape: ExpertSpec, type_name: str) -> LayerWeights:
    """A layer of experts of this shape and type, in memory that nobody reads."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    size = shape.hidden * shape.intermediate // block * block_bytes

    def matrix() -> Matrix:
        stacked = np.zeros(EXPERTS * size, dtype=np.uint8)
        return Matrix(type_name, tuple(stacked.reshape(EXPERTS, -1)), stacked)

    types = (type_name,) * 3
    spec = ExpertSpec(
        shape.hidden, shape.intermediate, EXPERTS, shape.top_k, *types, size, size, size
    )
    return LayerWeights(0, spec, matrix(), matrix(), matrix())
