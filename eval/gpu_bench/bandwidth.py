"""Bandwidths of CPU, GPU and pinned link, and the shares that transfers and kernels reach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from hybrimoe_plugin.compute.gpu.kernels.tuning import CACHE_BYTES
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.device.cuda_timer import device_us
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.weights.layer_weights import LayerWeights

BUFFER_BYTES = 1 << 29
REPEATS = 20
L2_BYTES = CACHE_BYTES
"""Timed experts must come from memory, so more bytes than this are read."""
HEADS, KEY_HEADS, HEAD_DIM = 32, 4, 128
"""Qwen3's attention."""


class Bandwidths(NamedTuple):
    """Bytes per microsecond."""

    cpu: float
    accelerator: float
    link: float

    def row(self) -> dict[str, float]:
        """The bandwidths in GB/s, as columns of a table."""
        return {f"{name}_gbps": value / 1e3 for name, value in self._asdict().items()}


def bandwidths(costs: CostModel, expert_bytes: float, device: torch.device | None) -> Bandwidths:
    """Measured on `device`; without one, those that the profile's costs imply."""
    if device is None:
        return _implied(costs, expert_bytes)
    count = BUFFER_BYTES // 8
    numbers = torch.ones(count, dtype=torch.int64)
    there = torch.ones(count, dtype=torch.int64, device=device)
    pinned = torch.ones(count, dtype=torch.int64).pin_memory()
    target = torch.empty_like(there)
    sum_us = _host_us(lambda: numbers.sum())
    copy_us = _device_us(lambda: target.copy_(there), device)
    transfer_us = _device_us(lambda: target.copy_(pinned, non_blocking=True), device)
    return Bandwidths(
        cpu=BUFFER_BYTES / sum_us,
        accelerator=2 * BUFFER_BYTES / copy_us,  # read and written
        link=BUFFER_BYTES / transfer_us,
    )


def _implied(costs: CostModel, expert_bytes: float) -> Bandwidths:
    transfer_us = costs.transfer_us - costs.link_latency_us
    return Bandwidths(
        cpu=expert_bytes / costs.cpu(1),
        accelerator=expert_bytes / costs.accelerator(1),
        link=expert_bytes / transfer_us,
    )


def shares(
    accelerator: SlotAccelerator,
    layers: Sequence[LayerWeights],
    measured: Bandwidths,
) -> dict[str, float]:
    """Shares that the engine's own onloads and decode compute reach, the lower of two layers.

    The first two layers are one of each kind.
    """
    found = [layer_shares(accelerator, layer, measured) for layer in layers[:2]]
    link, kernel = zip(*found, strict=True)
    return {"link_share": min(link), "kernel_bandwidth_share": min(kernel)}


def layer_shares(
    accelerator: SlotAccelerator,
    layer: LayerWeights,
    measured: Bandwidths,
) -> tuple[float, float]:
    """(share of the link, share of the device's memory bandwidth) that one layer's calls reach.

    The calls are onloads and decode compute.

    Mutates: `accelerator`, whose slots are allocated anew.
    """
    spec = layer.spec
    count = _timed_experts(layer)
    total_bytes = count * spec.expert_bytes
    accelerator.allocate(count, [layer])

    def onload() -> None:
        for slot in range(count):
            accelerator.onload(slot, layer, slot)

    # From the host's first call to the last byte in its slot.
    onload_us = _host_us(onload, accelerator.synchronize)
    decode = _decode_calls(accelerator, layer, count)
    decode_us = _device_us(decode, accelerator.device, ahead=True)
    link = total_bytes / onload_us / measured.link
    kernel = total_bytes / decode_us / measured.accelerator
    return link, kernel


def _timed_experts(layer: LayerWeights) -> int:
    """How many experts are timed: twice the bytes of the device's cache, in whole decode calls."""
    spec = layer.spec
    wanted = -(-2 * L2_BYTES // spec.expert_bytes)
    count = max(spec.top_k, min(spec.experts, wanted))
    return count // spec.top_k * spec.top_k


def _decode_calls(
    accelerator: SlotAccelerator,
    layer: LayerWeights,
    count: int,
) -> Callable[[], None]:
    """Calls of one token that use each of the first `count` slots once."""
    device, top_k = accelerator.device, layer.spec.top_k
    hidden = torch.randn(1, layer.spec.hidden, dtype=torch.bfloat16, device=device)
    weights = torch.full((1, top_k), 1 / top_k, dtype=torch.bfloat16, device=device)
    groups = [tuple(range(first, first + top_k)) for first in range(0, count, top_k)]
    ids = [torch.tensor([group], device=device) for group in groups]

    def decode() -> None:
        for group, slot_ids in zip(groups, ids, strict=True):
            accelerator.compute(group, hidden, slot_ids, weights)

    return decode


def attention_us(device: torch.device, lengths: Sequence[int], cudnn: bool) -> float:
    """Median wall time of one decode step's attention in us, each step with a new key length.

    Qwen3's heads, bf16. cuDNN keeps what it plans, so lengths must be new to the process.

    Args:
        lengths: of the keys, one for each step.
        cudnn: whether torch may leave attention to cuDNN.
    """
    times = []
    query = torch.randn(1, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device=device)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        for length in lengths:
            shape = (1, KEY_HEADS, length, HEAD_DIM)
            keys = torch.randn(shape, dtype=torch.bfloat16, device=device)
            float(keys.sum())  # waits until they are there
            started = time.perf_counter_ns()
            output = F.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)
            float(output.sum())
            times.append((time.perf_counter_ns() - started) / 1e3)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    return statistics.median(times)


def _host_us(work: Callable[[], object], after: Callable[[], None] | None = None) -> float:
    """Median of wall time, with `after` inside it; the first tenth of the runs warms up."""
    times = []
    warm_up = REPEATS // 10
    for _ in range(REPEATS + warm_up):
        started = time.perf_counter_ns()
        work()
        if after is not None:
            after()
        times.append((time.perf_counter_ns() - started) / 1e3)
    return statistics.median(times[warm_up:])


def _device_us(work: Callable[[], object], device: torch.device, ahead: bool = False) -> float:
    """Median of device time between two events; on the CPU, of wall time.

    Args:
        ahead: as in `device_us`.
    """
    if device.type != "cuda":
        return _host_us(work)
    return device_us(work, device, REPEATS, REPEATS // 10, ahead)
