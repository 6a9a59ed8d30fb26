"""Bandwidths of CPU, GPU and pinned link, and what share of them transfers and the decode kernel
reach.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.gpu.accelerator import SlotAccelerator
from hybrimoe_plugin.compute.gpu.kernels.tuning import CACHE_BYTES
from hybrimoe_plugin.device.cuda_timer import device_us
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.weights.layer_weights import LayerWeights

BUFFER_BYTES = 1 << 29
REPEATS = 20
L2_BYTES = CACHE_BYTES
"""Experts that are timed must come from memory."""


class Bandwidths(NamedTuple):
    """Bytes per microsecond."""

    cpu: float
    accelerator: float
    link: float

    def row(self) -> dict[str, float]:
        return {f"{name}_gbps": value / 1e3 for name, value in self._asdict().items()}


def bandwidths(costs: CostModel, expert_bytes: float, device: torch.device | None) -> Bandwidths:
    """Measured on `device`; without one, what the profile's costs amount to."""
    if device is None:
        transfer_us = costs.transfer_us - costs.link_latency_us
        return Bandwidths(
            expert_bytes / costs.cpu(1),
            expert_bytes / costs.accelerator(1),
            expert_bytes / transfer_us,
        )
    numbers = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64)
    cpu = BUFFER_BYTES / _host_us(lambda: numbers.sum())
    there = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(there)
    accelerator = 2 * BUFFER_BYTES / _device_us(lambda: target.copy_(there), device)
    pinned = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64).pin_memory()
    link = BUFFER_BYTES / _device_us(lambda: target.copy_(pinned, non_blocking=True), device)
    return Bandwidths(cpu, accelerator, link)


def shares(
    accelerator: SlotAccelerator, layers: Sequence[LayerWeights], measured: Bandwidths
) -> dict[str, float]:
    """What the engine's own calls reach (onloads, decode compute): the lower share over both kinds
    of layers.
    """
    found = [layer_shares(accelerator, layer, measured) for layer in layers[:2]]
    return {
        "link_share": min(link for link, _ in found),
        "kernel_bandwidth_share": min(kernel for _, kernel in found),
    }


def layer_shares(
    accelerator: SlotAccelerator, layer: LayerWeights, measured: Bandwidths
) -> tuple[float, float]:
    """(share of the link, share of the device's memory bandwidth) that onloads and decode compute
    of a layer reach.

    Mutates: `accelerator`, whose slots are made anew.
    """
    spec, device = layer.spec, accelerator.device
    count = max(spec.top_k, min(spec.experts, -(-2 * L2_BYTES // spec.expert_bytes)))
    count = count // spec.top_k * spec.top_k
    accelerator.allocate(count, [layer])

    def onload() -> None:
        for slot in range(count):
            accelerator.onload(slot, layer, slot)

    # From the host's first call to the last byte in its slot.
    link = count * spec.expert_bytes / _host_us(onload, accelerator.synchronize)
    hidden = torch.randn(1, spec.hidden, dtype=torch.bfloat16, device=device)
    weights = torch.full((1, spec.top_k), 1 / spec.top_k, dtype=torch.bfloat16, device=device)
    groups = [tuple(range(first, first + spec.top_k)) for first in range(0, count, spec.top_k)]
    ids = [torch.tensor([group], device=device) for group in groups]

    def decode() -> None:
        for group, slot_ids in zip(groups, ids, strict=True):
            accelerator.compute(group, hidden, slot_ids, weights)

    kernel = count * spec.expert_bytes / _device_us(decode, device, ahead=True)
    return link / measured.link, kernel / measured.accelerator


def attention_us(device: torch.device, lengths: Sequence[int], cudnn: bool) -> float:
    """Median wall time of one decode step's attention, in us, where every step sees a length for
    the first time.

    Qwen3's heads, bf16. What cuDNN plans it keeps, so lengths must be new to the process.

    Args:
        lengths: of the keys, one for each step.
        cudnn: whether torch may leave attention to cuDNN.
    """
    heads, groups, width, times = 32, 4, 128, []
    query = torch.randn(1, heads, 1, width, dtype=torch.bfloat16, device=device)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        for length in lengths:
            keys = torch.randn(1, groups, length, width, dtype=torch.bfloat16, device=device)
            float(keys.sum())  # they are there
            started = time.perf_counter_ns()
            float(F.scaled_dot_product_attention(query, keys, keys, enable_gqa=True).sum())
            times.append((time.perf_counter_ns() - started) / 1e3)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    return statistics.median(times)


def _host_us(work: Callable[[], object], after: Callable[[], None] | None = None) -> float:
    """Median of wall time, with `after` inside it; the first tenth of the runs warms up."""
    times = []
    for _ in range(REPEATS + REPEATS // 10):
        started = time.perf_counter_ns()
        work()
        if after is not None:
            after()
        times.append((time.perf_counter_ns() - started) / 1e3)
    return statistics.median(times[REPEATS // 10 :])


def _device_us(work: Callable[[], object], device: torch.device, ahead: bool = False) -> float:
    """Median of device time between two events; `ahead` as in `device_us`. On the CPU, of wall
    time.
    """
    if device.type != "cuda":
        return _host_us(work)
    return device_us(work, device, REPEATS, REPEATS // 10, ahead)
