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
    by_load,
    measure_accelerator,
    union_ids,
    union_note,
)
from hybrimoe_plugin.engine.threads import thread_candidates
from hybrimoe_plugin.policy.profile import MachineProfile, Side
from hybrimoe_plugin.policy.step import FEW_ROWS, loads
from hybrimoe_plugin.weights.layer_weights import LayerWeights

REPEATS = 5
FEW_ROWS_LOADS = (1, 4, 2, 3, 16, 8, 32)
"""Tokens of an expert whose time is measured in calls of a few rows, the most telling first."""
MOST_GROUPS = 8
"""Most sets of K experts in such a call: beside so many, what it does once weighs little."""
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
                few_rows = _measure_few_rows(weights, cpu, side, median)
                union = _check_union(weights, cpu, few_rows or side, median)
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
        cpu_few_rows=few_rows,
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
    """Time per expert at each load in calls of one token and in prompts."""
    spec = weights.spec
    many = max(2, min(8, spec.experts))

    def most(load: int) -> int:
        if load == 1 and spec.top_k > 1:  # In decode it is one token with its experts.
            return min(many, spec.top_k)
        return many if load <= FEW_TOKENS else max(2, many // 2)

    def call(experts: int, load: int) -> float:
        return _cpu_call(weights, cpu, experts, load, median)

    return _sweep(call, LOADS, 1, most, threads)


def _measure_few_rows(
    weights: LayerWeights, cpu: CPUBackend, side: Side, median: Median
) -> Side | None:
    """Time per expert at each load in calls of a few rows.

    Other graphs compute them than compute one token or a prompt, and they have more to do beside
    the experts.

    Args:
        side: times in calls of one token and in prompts.

    Returns:
        None where all rows would share experts, or where it would take too long.
    """
    spec = weights.spec
    groups = min(MOST_GROUPS, spec.experts // spec.top_k)
    few = 2 * spec.top_k  # Two rows are the fewest that are no single token.
    many = groups * spec.top_k
    # All calls rotate over the experts that the first one warms up: a file's pages are slow when
    # first read.
    warm_ups = 2
    rotated = min(warm_ups * many, spec.experts)
    turns = range(warm_ups + REPEATS)
    load_1_s = (few + many) * side.us[0] * len(turns) / 1e6
    if groups < 3 or load_1_s > BUDGET_S / 2:
        return None

    def most(load: int) -> int:
        return min(groups, FEW_ROWS // load) * spec.top_k

    def call(experts: int, load: int) -> float:
        tokens = load * experts // spec.top_k
        in_turn = torch.arange(tokens * spec.top_k).view(tokens, spec.top_k) % experts
        ids = [(in_turn + turn * experts) % rotated for turn in turns]
        return _timed(weights, cpu, ids, median, warm_ups)

    return _sweep(call, FEW_ROWS_LOADS, few, most, side.threads)


def _sweep(
    call: Callable[[int, int], float],
    sweep: Sequence[int],
    few: int,
    most: Callable[[int], int],
    threads: int | None,
) -> Side:
    """Time per expert at each load, and what the first expert costs beyond it.

    One call of n experts takes `first + n * expert`: two values of n give both. `first` is measured
    at load 1 and taken to be the same for all loads, so one call is enough for each other load.

    Args:
        call: gives the time in us of so many experts at a load.
        sweep: the loads, 1 first.
        few: the smaller number of experts at load 1.
        most: gives the larger one at each load.
        threads: of the CPU.
    """
    each: dict[int, float] = {}
    first_us = 0.0
    started = time.perf_counter()
    for load in sweep:
        experts = most(load)
        if load == 1:
            large_us = call(experts, load)
            small_us = call(few, load)
            # Noise may not make each more cost less than a twentieth of the first.
            each_us = max((large_us - small_us) / (experts - few), 0.05 * small_us / few)
            first_us = max(0.0, small_us - few * each_us)
        else:
            large_us = call(experts, load)
            each_us = max((large_us - first_us) / experts, 0.05 * large_us / experts)
        each[load] = each_us
        if time.perf_counter() - started > BUDGET_S:
            break
    return Side(first_us, *by_load(each), threads)


def _check_union(weights: LayerWeights, cpu: CPUBackend, side: Side, median: Median) -> str:
    """Time a call of a few rows, whose experts differ in load."""
    spec = weights.spec
    ids = union_ids(spec.experts, spec.top_k)
    turns = [torch.from_numpy(ids)] * (REPEATS + 1)
    return union_note("CPU", side, ids, _timed(weights, cpu, turns, median))


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
    turns = []
    for turn in range(repeats + 1):
        # Other experts in every call: their weights come from memory, as they do in a model.
        shift = turn * experts
        chosen = [(shift + index) % spec.experts for index in range(experts)]
        turns.append(torch.tensor(chosen).repeat_interleave(load).view(tokens, each))
    return _timed(weights, cpu, turns, median)


def _timed(
    weights: LayerWeights,
    cpu: CPUBackend,
    turns: Sequence[torch.Tensor],
    median: Median,
    warm_ups: int = 1,
) -> float:
    """Median time in us of a call with the experts [T, K] of each turn after the warm-ups."""
    tokens, each = turns[0].shape
    hidden = torch.randn(tokens, weights.spec.hidden, dtype=torch.bfloat16)
    routing = torch.ones(tokens, each)
    times = []
    for ids in turns:
        mine = list(loads(ids.numpy()))
        start = time.perf_counter_ns()
        cpu.submit(0, hidden, ids, routing, mine)
        cpu.sync()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return median(times[warm_ups:])
