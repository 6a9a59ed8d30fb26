"""How fast are memory and link, and how much of that do transfers and decode kernels reach?

Also what a prefetch costs a demand load behind it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from eval.gpu_bench import bandwidth
from eval.gpu_bench.bandwidth import Bandwidths, layer_shares
from eval.gpu_check.place import Place, Row
from eval.kernel_cases.data import random_matrices
from eval.kernel_cases.shapes import Shape
from eval.models.layers import layers_of
from eval.models.routing import published_costs
from eval.models.shapes import MODELS, Model
from eval.reporting.quantiles import percentiles
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.compute.gpu.kernels.base import Kernels
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.compute.gpu.slot_transfers import AHEAD_DEPTH
from hybrimoe_plugin.replay.trace import TraceHeader
from hybrimoe_plugin.weights.layer_weights import LayerWeights, Matrix

PAGEABLE_BYTES = 1 << 28
DEPTHS = (1, 2, 4)
AHEAD = 8
"""Prefetches that are waiting when a demand load comes."""
ONLOADS = 8
"""Experts that are sent one behind the other, as a layer that misses them does."""
REPEATS = 20
SMALL, LARGE = MODELS[0], MODELS[2]
KINDS = ("Q4_K", "Q4_K with Q6_K down")
"""The two kinds of layers of a model, as rows call them."""


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`. The stage `int8` has kernels of all types."""
    device = None if place.dry else place.device
    expert_bytes = layer(SMALL, place).spec.expert_bytes
    measured = bandwidth.bandwidths(published_costs(SMALL), expert_bytes, device)
    pageable = None if place.dry else _pageable(place)
    yield {"case": "memory and link", **measured.row(), "pageable_gbps": pageable}
    for model in (SMALL, LARGE):
        for number, kind in enumerate(KINDS):
            weights = layer(model, place, number)
            yield _row(place, measured, f"{model.name}, {kind}", weights)
    for model in (SMALL, LARGE):
        yield _onload_cost(place, model)
    for depth in DEPTHS:
        yield _demand(place, depth)


def layer(model: Model, place: Place, number: int = 0) -> LayerWeights:
    """A layer of the model's first or second kind, with fewer experts than the model has."""
    experts, top_k = (8, 2) if model is LARGE else (64, 8)
    header = TraceHeader(model.name, 1, experts, top_k, 0, "random")
    return layers_of(model, header, number + 1, place.dry)[number]


def one_type(kind: str) -> LayerWeights:
    """A layer of the small model's shape in one type, with more experts than any cache holds."""
    shape = Shape(SMALL.name, (kind,) * 3, SMALL.hidden, SMALL.intermediate, experts=8, top_k=8)
    more = 2 * bandwidth.L2_BYTES // shape.spec.expert_bytes
    shape = shape._replace(experts=8 + more)
    matrices = []
    for part in random_matrices(shape, 0, torch.device("cpu")):
        stored = part.numpy()
        matrices.append(Matrix(kind, tuple(stored), stored.ravel()))
    gate, up, down = matrices
    return LayerWeights(0, shape.spec, gate, up, down)


def _row(place: Place, measured: Bandwidths, name: str, weights: LayerWeights) -> Row:
    """Shares of one layer, with tuned tiles."""
    link, kernel = shares(place, measured, weights)
    row = {"case": name, "expert_kb": weights.spec.expert_bytes / 1e3}
    if place.dry:
        # Emulated times are the CPU's, the assumed bandwidths are not: ratios would mean nothing.
        return row
    return {**row, "link_share": link, "kernel_share": kernel}


def shares(
    place: Place, measured: Bandwidths, weights: LayerWeights, kernels: Kernels | None = None
) -> tuple[float, float]:
    """As `layer_shares`, on an accelerator of its own.

    Args:
        kernels: in place of the product's.
    """
    made = _accelerator(place)
    made.kernels = kernels or made.kernels
    try:
        return layer_shares(made, weights, measured)
    finally:
        made.close()


def _onload_cost(place: Place, model: Model) -> Row:
    """What the host spends on an expert that is sent to its slot, whatever the link does then."""
    weights = layer(model, place)
    made = _accelerator(place)
    slots = min(ONLOADS, weights.spec.experts)
    times: list[float] = []
    try:
        made.allocate(slots, [weights])
        for _ in range(REPEATS + 2):  # the first two warm up
            made.synchronize()
            started = time.perf_counter_ns()
            for slot in range(slots):
                made.onload(slot, weights, slot)
            times.append((time.perf_counter_ns() - started) / 1e3 / slots)
    finally:
        made.close()
    low, middle, high = percentiles(times[2:])
    return {
        "case": f"{model.name}: the host's part of an onload",
        "onload_us_p20": low,
        "onload_us_p50": middle,
        "onload_us_p80": high,
    }


def _demand(place: Place, depth: int) -> Row:
    """Wall time until a demand-loaded expert is computed, with and without waiting prefetches."""
    weights = layer(SMALL, place)
    made = _accelerator(place, depth)
    try:
        made.allocate(AHEAD + 2, [weights])
        alone = [_demand_us(made, weights, 0) for _ in range(REPEATS)]
        behind = [_demand_us(made, weights, AHEAD) for _ in range(REPEATS)]
    finally:
        made.close()
    return {
        "case": f"a demand load, prefetch depth {depth}",
        "alone_us": statistics.median(alone),
        "behind_prefetches_us": statistics.median(behind),
    }


def _demand_us(accelerator: SlotAccelerator, weights: LayerWeights, ahead: int) -> float:
    """Wall time of one demand load in us, behind `ahead` prefetches that are then cancelled."""
    spec = weights.spec
    on_cpu = accelerator.device.type == "cpu"
    slot = ahead
    # One expert alone is wanted; the other places of the token are empty.
    chosen = torch.full((1, spec.top_k), -1)
    chosen[0, 0] = slot
    states = torch.randn(1, spec.hidden, dtype=torch.float32 if on_cpu else torch.bfloat16)
    hidden = accelerator.copy_to_device(states)
    ids = accelerator.copy_to_device(chosen)
    routing = accelerator.copy_to_device(torch.ones(1, spec.top_k))
    accelerator.synchronize()
    for number in range(ahead):
        accelerator.onload(number, weights, number, ahead=True)
    started = time.perf_counter_ns()
    accelerator.onload(slot, weights, slot)
    accelerator.compute((slot,), hidden, ids, routing)
    if not on_cpu:
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
