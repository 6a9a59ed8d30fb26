"""Where a decode step's time goes: how long the device is busy, and what it and the host do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from eval.cuda_model.subject import Subject
from eval.gpu_check.check_model import PROMPT_TOKENS, given, model_file
from eval.gpu_check.place import Place, Row
from eval.models.routing import Routing
from eval.policies.systems import OURS
from hybrimoe_plugin.replay.trace import Call

PROFILED = 3
TIMED = 24
WARM_UP = 6
SHOWN = 8
"""The longest of the device's kernels and of the host's operations."""
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
)


def run(place: Place) -> Iterator[Row]:
    """See `place.Run`."""
    routing = given(place, PROMPT_TOKENS)
    subject = Subject(model_file(place), OURS, 0.5, routing, place.dry)
    try:
        yield from _steps(place, subject, routing)
    finally:
        subject.close()


@torch.no_grad()
def _steps(place: Place, subject: Subject, routing: Routing) -> Iterator[Row]:
    layers = subject.model.config.num_hidden_layers
    _, cache = subject.run(routing.prompts[0], None)
    count = WARM_UP + TIMED + PROFILED
    steps = [routing.decode[number % len(routing.decode)] for number in range(count)]
    wall = []
    for calls in steps[:-PROFILED]:
        spent, cache = _timed(place, subject, calls, cache)
        wall.append(spent)
    step_us = statistics.median(wall[WARM_UP:])
    activities = [ProfilerActivity.CPU]
    if not place.dry:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        for calls in steps[-PROFILED:]:
            _, cache = _timed(place, subject, calls, cache)
    events: Sequence[Any] = profiled.events() or ()
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    on_host = [event for event in events if event.device_type.name != "CUDA"]
    launches = sum(event.name.startswith(LAUNCHES) for event in events)
    row = {
        "case": "a decode step of ours, half of the experts cached",
        "layers": layers,
        "step_us": step_us,
        "launches_per_layer": launches / PROFILED / layers,
    }
    if on_device:
        spans = [(event.time_range.start, event.time_range.end) for event in on_device]
        busy_us = _union_us(spans) / PROFILED
        row["device_busy_us"] = busy_us
        row["host_us_per_layer"] = (step_us - busy_us) / layers
    else:
        row["missing"] = "a card" if place.dry else "the profiler's view of the device"
    yield row
    for kind, some in (("device", on_device), ("host", on_host)):
        for name, us in _sums(some)[:SHOWN]:
            yield {"case": f"{kind}: {name[:80]}", "us_per_layer": us / PROFILED / layers}


def _timed(
    place: Place,
    subject: Subject,
    calls: Sequence[Call],
    cache: Any,
) -> tuple[float, Any]:
    """(wall time of one step in us, KV cache).

    On a card it is the subject's own time, which leaves out setting the routing.
    """
    started = time.perf_counter_ns()
    spent, cache = subject.run(calls, cache)
    wall = (time.perf_counter_ns() - started) / 1e3
    return (wall if place.dry else spent), cache


def _sums(events: Sequence[Any]) -> list[tuple[str, float]]:
    """(name, time of its own in us) of all events of that name, longest first."""
    found: dict[str, float] = {}
    for event in events:
        own = float(event.self_cpu_time_total or event.time_range.elapsed_us())
        found.setdefault(event.name, 0.0)
        found[event.name] += own
    return sorted(found.items(), key=lambda item: -item[1])


def _union_us(spans: Sequence[tuple[float, float]]) -> float:
    """How long at least one of the spans was running."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
