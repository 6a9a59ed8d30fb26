"""Measure what an expert costs on this machine, with the model's own first MoE layer."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from hybrimoe_plugin.compute.backends import CPUBackend
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.device.machine import hardware, versions
from hybrimoe_plugin.device.noise import Median
from hybrimoe_plugin.engine.calibrate_accelerator import (
    LOADS,
    UNION_ROWS,
    by_load,
    measure_accelerator,
    union_ids,
    union_note,
)
from hybrimoe_plugin.engine.threads import thread_candidates
from hybrimoe_plugin.policy.profile import MachineProfile, Side
from hybrimoe_plugin.policy.step import loads
from hybrimoe_plugin.weights.layer_weights import LayerWeights

REPEATS = 5
UNION_REPEATS = 3
FEW_TOKENS = 8
"""Load above which half as many experts are measured at a time, since each takes longer."""
BUDGET_S = 4.0
"""Time for one sweep of measurements; what is not reached by then is left to interpolation."""


def calibrate(
    weights: LayerWeights,
    make_cpu: Callable[[int], CPUBackend],
    accelerator: SlotAccelerator | None,
    *,
    threads: int | None = None,
    progress: bool = True,
    median: Median = statistics.median,
) -> MachineProfile:
    """Measure one layer's experts on the CPU, on the accelerator and on the link.

    Args:
        make_cpu: makes a CPU backend with a number of threads.
        threads: None to try several numbers and take the fastest.
        progress: show a bar.
        median: of the times of one call's repetitions.
    """
    counts = thread_candidates() if threads is None else [threads]
    with tqdm(total=len(counts) + 2, desc="calibrating", disable=not progress, leave=False) as bar:
        best, cpu = _choose_threads(weights, make_cpu, counts, bar, median)
        try:
            with _quiet_torch(cpu):
                side = _measure_cpu(weights, cpu, best, median)
                union = _check_union(weights, cpu, side, median)
        finally:
            cpu.close()
        bar.update()
        accelerated = measure_accelerator(weights, accelerator, median)
        bar.update()
    emulated = accelerator is not None and accelerator.name == "emulated"
    now = datetime.datetime.now(datetime.timezone.utc)
    return MachineProfile(
        name="this machine",
        label="emulated" if emulated else "measured",
        created=now.isoformat(timespec="seconds"),
        spec=weights.spec,
        cpu=side,
        accelerator=accelerated.side,
        link=accelerated.link,
        between_layers_us=0.0,
        hardware=hardware(),
        versions=versions(),
        notes=(union, *accelerated.notes),
    )


@contextmanager
def _quiet_torch(cpu: CPUBackend) -> Iterator[None]:
    """Use one torch thread while a backend's own workers are measured: both want the cores."""
    before = torch.get_num_threads()
    if cpu.workers:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _choose_threads(
    weights: LayerWeights,
    make_cpu: Callable[[int], CPUBackend],
    counts: Sequence[int],
    bar: Any,
    median: Median,
) -> tuple[int, CPUBackend]:
    """The thread count with the fastest decode call, and its backend.

    Decode is what waits for the CPU most.
    """
    best: tuple[float, int, CPUBackend] | None = None
    for count in counts:
        cpu = make_cpu(count)
        cpu.add_layer(weights)
        with _quiet_torch(cpu):
            spent = _cpu_call(weights, cpu, weights.spec.top_k, 1, median, 2 * REPEATS)
        if best is None or spent < best[0]:
            if best is not None:
                best[2].close()
            best = spent, count, cpu
        else:
            cpu.close()
        bar.update()
    assert best is not None
    _, count, cpu = best
    return count, cpu


def _measure_cpu(weights: LayerWeights, cpu: CPUBackend, threads: int, median: Median) -> Side:
    """Time per expert at each load, and what the first expert costs beyond it.

    One call of n experts takes `first + n * expert`: two values of n give both. `first` is measured
    at load 1 and taken to be the same for all loads, so one call is enough for each other load.
    """
    spec = weights.spec
    few = 1
    many = max(2, min(8, spec.experts))
    each: dict[int, float] = {}
    first_us = 0.0
    started = time.perf_counter()
    for load in LOADS:
        if load == 1:
            # In decode it is one token with its experts.
            most = min(many, spec.top_k) if spec.top_k > 1 else many
            small_us = _cpu_call(weights, cpu, few, load, median)
            large_us = _cpu_call(weights, cpu, most, load, median)
            # Noise may not make each more cost less than a twentieth of the first.
            each_us = max((large_us - small_us) / (most - few), 0.05 * small_us / few)
            first_us = max(0.0, small_us - few * each_us)
        else:
            most = many if load <= FEW_TOKENS else max(2, many // 2)
            large_us = _cpu_call(weights, cpu, most, load, median)
            each_us = max((large_us - first_us) / most, 0.05 * large_us / most)
        each[load] = each_us
        if time.perf_counter() - started > BUDGET_S:
            break
    return Side(first_us, *by_load(each), threads)


def _check_union(weights: LayerWeights, cpu: CPUBackend, side: Side, median: Median) -> str:
    """Time a call of a few rows, whose experts differ in load."""
    spec = weights.spec
    ids = union_ids(spec.experts, spec.top_k)
    hidden = torch.randn(UNION_ROWS, spec.hidden, dtype=torch.bfloat16)
    routing = torch.ones(ids.shape)
    times = []
    for _ in range(UNION_REPEATS + 1):
        start = time.perf_counter_ns()
        cpu.submit(0, hidden, torch.from_numpy(ids), routing, list(loads(ids)))
        cpu.sync()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return union_note("CPU", side, ids, median(times[1:]))


def _cpu_call(
    weights: LayerWeights,
    cpu: CPUBackend,
    experts: int,
    load: int,
    median: Median,
    repeats: int = REPEATS,
) -> float:
    """Median time in us of a call in which `experts` experts have `load` tokens each."""
    spec = weights.spec
    tokens, each = load * experts, 1
    if load == 1 and experts <= spec.top_k:
        tokens, each = 1, experts
    hidden = torch.randn(tokens, spec.hidden, dtype=torch.bfloat16)
    routing = torch.ones(tokens, each)
    times = []
    for turn in range(repeats + 1):
        # Other experts in every call: their weights come from memory, as they do in a model.
        shift = turn * experts
        chosen = [(shift + index) % spec.experts for index in range(experts)]
        ids = torch.tensor(chosen).repeat_interleave(load).view(tokens, each)
        start = time.perf_counter_ns()
        cpu.submit(0, hidden, ids, routing, chosen)
        cpu.sync()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return median(times[1:])
