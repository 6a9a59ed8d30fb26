"""Measure what an expert costs on the accelerator and on its link.

An emulated accelerator cannot be measured: its times and those of its link are assumed
(`ASSUMED_*`), the profile says so, and whatever is computed from them is labelled emulated.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.device.noise import Median
from hybrimoe_plugin.engine.waves import wave_calls
from hybrimoe_plugin.policy.costs import CostCurve
from hybrimoe_plugin.policy.profile import Link, Side
from hybrimoe_plugin.policy.step import loads
from hybrimoe_plugin.weights.layer_weights import LayerWeights

LOADS = (1, 2, 4, 16, 64, 8, 3, 32, 6, 12, 24)
"""Tokens of an expert whose time is measured, the most telling ones first: time may run out.

Calls of a few rows give most experts one to eight tokens, where one kernel takes over from another.
"""
UNION_ROWS = 16
"""Rows of the call that checks whether single experts' times add up."""
WARM_UPS = 5
REPEATS = 15

_SLOTS = 32
"""Slots that are filled to measure a device.

For all but the smallest experts they are more bytes than its cache holds.
"""

ASSUMED_LINK = Link(gbps=12.0, latency_us=15.0)
"""An ordinary desktop slot, PCIe 4.0 x8, pinned."""
ASSUMED_ACCELERATOR_GBPS = 250.0
"""Weights read per second by a decode kernel on an entry-level discrete GPU (half of 500 GB/s)."""
ASSUMED_ACCELERATOR_GFLOPS = 15e3
ASSUMED_LAUNCH_US = 20.0


class AcceleratorTimes(NamedTuple):
    """What a profile says of the accelerator; None where there is none."""

    side: Side | None
    link: Link | None
    notes: tuple[str, ...] = ()


def measure_accelerator(
    weights: LayerWeights, accelerator: SlotAccelerator | None, median: Median
) -> AcceleratorTimes:
    """Times of an expert on the accelerator and on its link, measured or assumed."""
    if accelerator is None:
        return AcceleratorTimes(None, None)
    if accelerator.name == "emulated":
        return _assumed(weights.spec)
    side, link = measure_cuda(weights, accelerator, median)
    return AcceleratorTimes(side, link, (_check_union(weights, accelerator, side, median),))


def _assumed(spec: ExpertSpec) -> AcceleratorTimes:
    """An expert takes the time to read its weights plus that to multiply each token."""
    read_us = spec.expert_bytes / (ASSUMED_ACCELERATOR_GBPS * 1e3)
    flops = 6.0 * spec.hidden * spec.intermediate
    token_us = flops / (ASSUMED_ACCELERATOR_GFLOPS * 1e3)
    loads = (1, 64, 1024)
    times = tuple(read_us + load * token_us for load in loads)
    note = (
        f"accelerator and link are assumed: {ASSUMED_LINK.gbps} GB/s, "
        f"{ASSUMED_ACCELERATOR_GBPS} GB/s of weights, "
        f"{ASSUMED_ACCELERATOR_GFLOPS / 1e3:.0f} TFLOP/s"
    )
    return AcceleratorTimes(Side(ASSUMED_LAUNCH_US, loads, times), ASSUMED_LINK, (note,))


def measure_cuda(
    weights: LayerWeights, accelerator: SlotAccelerator, median: Median = statistics.median
) -> tuple[Side, Link]:
    """Time slots and link with the engine's own calls, from submission to synchronisation.

    Differences between many and one give what each more costs. Calls rotate over the slots, so
    that weights come from the device's memory and not from its cache.
    """
    spec = weights.spec
    slots = min(spec.experts, _SLOTS)
    many = max(2, min(8, slots // 2))
    accelerator.allocate(slots, [weights])
    turns = cycle(range(slots))

    def onload(count: int) -> None:
        for slot in islice(turns, count):
            accelerator.onload(slot, weights, slot)

    onload(slots)
    one_us = _timed(accelerator, lambda: onload(1), median)
    many_us = _timed(accelerator, lambda: onload(many), median)
    # Transfers queue up behind one another: what each more takes has its share of latency in it.
    transfer_us = _each_us(one_us, many_us, many)
    link = Link(spec.expert_bytes / (transfer_us * 1e3), 0.0)

    each: dict[int, float] = {}
    first_us = 0.0
    for load in LOADS:
        compute = _compute_calls(accelerator, weights, load, turns)
        one_us = _timed(accelerator, compute(1), median)
        many_us = _timed(accelerator, compute(many), median)
        each_us = _each_us(one_us, many_us, many)
        each[load] = each_us
        if load == 1:
            first_us = max(0.0, one_us - each_us)
    return Side(first_us, *by_load(each)), link


def by_load(each: Mapping[int, float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(loads, times), both in the order of loads."""
    loads = sorted(each)
    return tuple(loads), tuple(each[load] for load in loads)


def _check_union(
    weights: LayerWeights, accelerator: SlotAccelerator, side: Side, median: Median
) -> str:
    """Time a call of a few rows in one wave; its experts fit into the slots together."""
    spec, device = weights.spec, accelerator.device
    ids = union_ids(accelerator.slots, spec.top_k)
    hidden = torch.randn(UNION_ROWS, spec.hidden, dtype=torch.bfloat16, device=device)
    routing = torch.ones(ids.shape, device=device)
    wave = {expert: expert for expert in loads(ids)}

    def compute() -> None:
        calls = wave_calls(accelerator, weights, [wave], ids, hidden, routing)
        calls.compute(0)
        calls.output()

    return union_note("accelerator", side, ids, _timed(accelerator, compute, median))


def union_ids(experts: int, top_k: int) -> NDArray[np.int64]:
    """[UNION_ROWS, K] experts of a call of a few rows: any, but no row the same one twice."""
    scores = np.random.default_rng(0).random((UNION_ROWS, experts))
    return np.argsort(scores, axis=1)[:, :top_k]


def union_note(name: str, side: Side, ids: NDArray[np.int64], took_us: float) -> str:
    """Compare the measured time of such a call with the time that plans assume.

    Args:
        name: of the processor.
        side: its times.
        ids: [T, K] of the call, all computed there.
        took_us: as measured.
    """
    curve = CostCurve(side.tokens, side.us)
    union = loads(ids)
    expected_us = side.first_us + sum(map(curve, union.values()))
    return (
        f"{name}: {UNION_ROWS} rows with {len(union)} experts took {took_us:.0f} us; the times of "
        f"single experts add up to {expected_us:.0f} us, {expected_us / took_us:.2f} of it"
    )


def _compute_calls(
    accelerator: SlotAccelerator, weights: LayerWeights, load: int, turns: cycle[int]
) -> Callable[[int], Callable[[], object]]:
    """Number of slots -> a call that computes `load` tokens with each of them.

    Each slot holds the expert of its number.
    """
    device = accelerator.device
    hidden = torch.randn(load, weights.spec.hidden, dtype=torch.bfloat16, device=device)

    def calls(count: int) -> Callable[[], object]:
        def compute() -> None:
            group = list(islice(turns, count))
            ids = np.tile(group, (load, 1))
            routing = torch.ones(load, count, device=device)
            wave = {expert: expert for expert in group}
            calls = wave_calls(accelerator, weights, [wave], ids, hidden, routing)
            calls.compute(0)
            calls.output()

        return compute

    return calls


def _each_us(one_us: float, many_us: float, many: int) -> float:
    """What each more costs; noise may not make it less than a twentieth of the first."""
    return max((many_us - one_us) / (many - 1), 0.05 * one_us)


def _timed(accelerator: SlotAccelerator, call: Callable[[], object], median: Median) -> float:
    """Median time in us of a call and the synchronisation after it."""
    times = []
    for _ in range(WARM_UPS + REPEATS):
        start = time.perf_counter_ns()
        call()
        accelerator.synchronize()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return median(times[WARM_UPS:])
