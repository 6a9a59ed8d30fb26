"""How fast are memory and link, how much of that do transfers and decode kernels reach, what does a
prefetch cost?
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from eval import cuda_bandwidth
from eval.cuda_bandwidth import Bandwidths, layer_shares
from eval.gpu_stages.place import Place, Row
from eval.kernel_cases import TYPES, Shape, random_matrices
from eval.shapes import MODELS, Model, layers_of, published_costs
from hybrimoe_plugin.compute.gpu.accelerator import SlotAccelerator, make_accelerator
from hybrimoe_plugin.compute.gpu.kernels.blocks import Blocks
from hybrimoe_plugin.compute.gpu.kernels.layout import slot_layout
from hybrimoe_plugin.compute.gpu.slot_transfers import AHEAD_DEPTH
from hybrimoe_plugin.replay.trace import TraceHeader
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix

PAGEABLE_BYTES = 1 << 28
DEPTHS = (1, 2, 4)
AHEAD = 8
"""Prefetches that are waiting when a demand load comes."""
REPEATS = 20
SMALL, LARGE = MODELS[0], MODELS[2]


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`. Decode kernels of the usual types first, then the link, then the other
    types.
    """
    measured = cuda_bandwidth.bandwidths(
        published_costs(SMALL),
        layer(SMALL, place).spec.expert_bytes,
        None if place.dry else place.device,
    )
    yield {
        "case": "memory and link",
        **measured.row(),
        "pageable_gbps": None if place.dry else _pageable(place),
    }
    for model in (SMALL, LARGE):
        for number, kind in enumerate(("Q4_K", "Q4_K with Q6_K down")):
            yield _shares(place, measured, f"{model.name}, {kind}", layer(model, place, number))
    for depth in DEPTHS:
        yield _demand(place, depth)
    for kind in () if place.dry else TYPES:
        yield _shares(place, measured, f"{SMALL.name}, all {kind}", _one_type(kind), tuned=False)


def layer(model: Model, place: Place, number: int = 0) -> LayerWeights:
    """A layer of the model's first or second kind, with fewer experts than it has where they are
    small.
    """
    experts, top_k = (8, 2) if model is LARGE else (64, 8)
    header = TraceHeader(model.name, 1, experts, top_k, 0, "random")
    return layers_of(model, header, number + 1, place.dry)[number]


def _one_type(kind: str) -> LayerWeights:
    """As many experts of the small model's shape in one type as no cache holds."""
    shape = Shape(SMALL.name, (kind,) * 3, SMALL.hidden, SMALL.intermediate, experts=8, top_k=8)
    shape = shape._replace(experts=8 + 2 * cuda_bandwidth.L2_BYTES // shape.spec.expert_bytes)
    stored = [part.numpy() for part in random_matrices(shape, 0, torch.device("cpu"))]
    gate, up, down = (Matrix(kind, tuple(part), part.ravel()) for part in stored)
    return LayerWeights(0, shape.spec, gate, up, down)


def _shares(
    place: Place, measured: Bandwidths, name: str, weights: LayerWeights, tuned: bool = True
) -> Row:
    """Shares of one layer; without tuning in the tiles that follow from its shape, since tuning
    compiles for long.
    """
    made = _accelerator(place)
    if not tuned:
        from hybrimoe_plugin.compute.gpu.kernels.triton_ops import TritonKernels

        layout = slot_layout(weights.spec, planar=True)
        made.kernels = TritonKernels(place.device, Blocks.of(layout, weights.spec.top_k))
    try:
        link, kernel = layer_shares(made, weights, measured)
    finally:
        made.close()
    # Emulated, both are the CPU's and share no machine with the assumed bandwidths: ratios would be
    # of nothing.
    shares = {} if place.dry else {"link_share": link, "kernel_share": kernel}
    return {"case": name, "expert_kb": weights.spec.expert_bytes / 1e3, **shares}


def _demand(place: Place, depth: int) -> Row:
    """Wall time of a demand load until its expert has been computed, with prefetches waiting before
    it and without.
    """
    weights, made = layer(SMALL, place), _accelerator(place, depth)
    try:
        made.allocate(AHEAD + 2, [weights])
        alone = statistics.median(_demand_us(made, weights, 0) for _ in range(REPEATS))
        behind = statistics.median(_demand_us(made, weights, AHEAD) for _ in range(REPEATS))
    finally:
        made.close()
    return {
        "case": f"a demand load, prefetch depth {depth}",
        "alone_us": alone,
        "behind_prefetches_us": behind,
    }


def _demand_us(accelerator: SlotAccelerator, weights: LayerWeights, ahead: int) -> float:
    spec, place = weights.spec, accelerator.copy_to_device
    dtype = torch.float32 if accelerator.device.type == "cpu" else torch.bfloat16
    slot = ahead
    hidden, ids = place(torch.randn(1, spec.hidden, dtype=dtype)), torch.full((1, spec.top_k), -1)
    ids[0, 0] = slot
    ids, routing = place(ids), place(torch.ones(1, spec.top_k))
    accelerator.synchronize()
    for number in range(ahead):
        accelerator.onload(number, weights, number, ahead=True)
    started = time.perf_counter_ns()
    accelerator.onload(slot, weights, slot)
    accelerator.compute((slot,), hidden, ids, routing)
    if accelerator.device.type == "cuda":
        torch.cuda.current_stream(accelerator.device).synchronize()
    spent = (time.perf_counter_ns() - started) / 1e3
    for number in range(ahead):
        accelerator.cancel(number)
    accelerator.synchronize()
    return spent


def _accelerator(place: Place, depth: int = AHEAD_DEPTH) -> SlotAccelerator:
    made = make_accelerator(place.accelerator, place.device, ahead_depth=depth)
    assert made is not None
    return made


def _pageable(place: Place) -> float:
    """GB/s of copies from memory that the driver does not know."""
    source = torch.ones(PAGEABLE_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source, device=place.device)
    spent = []
    for _ in range(5):
        torch.cuda.synchronize(place.device)
        started = time.perf_counter_ns()
        target.copy_(source)
        torch.cuda.synchronize(place.device)
        spent.append(time.perf_counter_ns() - started)
    return PAGEABLE_BYTES / min(spent[1:])
