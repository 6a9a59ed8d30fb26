"""What a decoder layer takes with everything included, host and device: with and without the chain.

The chain launches the layers behind a MoE layer before the host knows its routing; its twin
(`host_path: wait`) stops in every layer for the host's plan. Both run here, one after the other, on
the same model, and on a tiny one whose tokens must be the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from eval.cuda_model.subject import Subject
from eval.gpu_bench import bandwidth
from eval.gpu_check.place import Place, Row
from eval.gpu_check.timing import measured
from eval.gpu_check.tiny_model import FUSED, compared, greedy
from eval.models import tiny
from eval.models.routing import Routing, published_costs
from eval.models.shapes import MODELS
from eval.policies.systems import System

GOAL_US = 139.0
"""A decoder layer with all experts cached: 150 tokens/s at 48 layers."""
PROFILED = 3
BLOCKING = (
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaDeviceSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "cuCtxSynchronize",
)
"""Calls of the driver in which the host waits for the device."""
ASKING = ("cudaEventQuery", "cudaStreamQuery", "cuEventQuery", "cuStreamQuery")
"""Calls in which it asks how far the device is; it may do that over and over until it is there."""
CHAIN, TWIN = "auto", "wait"


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`. What is judged by its goal comes first."""
    gbps = _memory_gbps(place)
    for ratio in (1.0, 0.5):
        for system in systems():
            yield _row(place, system, ratio, gbps)
    path = place.scratch / f"tiny-{FUSED}.gguf"
    tiny.write_quantised(path, FUSED)
    chain, twin = systems()
    for ratio in (1.0, 0.5):
        case = f"{FUSED}: greedy tokens, {ratio:.0%} of the experts cached"
        ours = greedy(place, FUSED, path, "float32", cache_ratio=ratio, **chain.settings)
        plain = greedy(place, FUSED, path, "float32", cache_ratio=ratio, **twin.settings)
        yield compared(f"{case}, {chain.name} and {twin.name}", ours, plain, judged=True)


def systems() -> list[System]:
    """Ours as it is, and with the host waiting in every layer."""
    return [System(f"host path {value}", {"host_path": value}) for value in (CHAIN, TWIN)]


def _row(place: Place, system: System, ratio: float, gbps: float) -> Row:
    """Times of one way at one cache size, and what the driver was asked for."""
    found = measured(place, system, ratio, more=_driver_calls)
    row = dict(found)
    us = row["decode_ms_p50"] * 1e3 / row["layers"]
    row["us_per_layer"] = us
    layer_bytes = row.pop("layer_bytes")
    if not place.dry:
        row["roofline_share"] = layer_bytes / gbps / 1e3 / us
        if ratio == 1.0:
            row["within_goal"] = us <= GOAL_US
    return row


@torch.no_grad()
def _driver_calls(subject: Subject, routing: Routing) -> Row:
    """Waits for the device in a token, without those of timing; bytes that a layer must read."""
    row: dict[str, Any] = {"layer_bytes": _layer_bytes(subject, routing)}
    if subject.dry:
        return row
    steps = routing.decode[-PROFILED:]
    _, cache = subject.run(routing.prompts[0], None)
    for calls in routing.decode[:PROFILED]:
        _, cache = subject.run(calls, cache)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as idle:
        for _ in range(2 * PROFILED):  # what `Subject.run` does before and behind a step
            subject.engine.accelerator.synchronize()
    with profile(activities=activities) as seen:
        for calls in steps:
            _, cache = subject.run(calls, cache)
    for name, kind in (("waits_per_token", BLOCKING), ("queries_per_token", ASKING)):
        row[name] = (_count(seen, kind) - _count(idle, kind)) / PROFILED
    return row


def _count(seen: Any, names: tuple[str, ...]) -> int:
    return sum(event.name in names for event in seen.events() or ())


def _layer_bytes(subject: Subject, routing: Routing) -> float:
    """Of one token in one layer: its experts, and everything else that the layer holds once."""
    layers = list(subject.model.model.layers)
    held = {
        id(tensor): tensor.nbytes
        for layer in layers
        for tensor in (*layer.parameters(), *layer.buffers())
    }
    experts = sum(weights.spec.expert_bytes for weights in subject.engine.layers)
    return (sum(held.values()) + routing.header.top_k * experts) / len(layers)


def _memory_gbps(place: Place) -> float:
    """The card's own copies; a dry run has no use for it."""
    if place.dry:
        return 1.0
    costs = published_costs(MODELS[0])
    return bandwidth.bandwidths(costs, 1.0, place.device).accelerator / 1e3
