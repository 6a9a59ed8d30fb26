"""Measure what an expert costs on this machine, and keep the result.

The CPU is measured with the model's own first MoE layer. An emulated accelerator and its link
cannot be measured: theirs are assumed (`ASSUMED_*`), the profile says so, and whatever is computed
from them is labelled emulated.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from hybrimoe_plugin.cache_folder import cache_dir, write_atomic
from hybrimoe_plugin.compute.backends import CPUBackend
from hybrimoe_plugin.compute.gpu.accelerator import SlotAccelerator
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.device.machine import hardware, versions
from hybrimoe_plugin.device.noise import Median, Noise
from hybrimoe_plugin.errors import ProfileError
from hybrimoe_plugin.policy.profile import Link, MachineProfile, Side
from hybrimoe_plugin.replay.profile_files import load_profile
from hybrimoe_plugin.weights.layer_weights import LayerWeights

log = logging.getLogger(__name__)

MakeCPU = Callable[[int], CPUBackend]

LOADS = (1, 2, 4, 16, 64)
REPEATS = 5
BUDGET_S = 4.0
"""Time for one sweep of measurements; what is not reached by then is left to extrapolation."""

_CUDA_SLOTS = 32
"""Slots that are filled to measure a device: more bytes than its cache holds, for all but the
smallest experts.
"""

ASSUMED_LINK = Link(gbps=12.0, latency_us=15.0)
"""An ordinary desktop slot, PCIe 4.0 x8, pinned."""
ASSUMED_ACCELERATOR_GBPS = 250.0
"""Weights read per second by a decode kernel on an entry-level discrete GPU (half of 500 GB/s)."""
ASSUMED_ACCELERATOR_GFLOPS = 15e3
ASSUMED_LAUNCH_US = 20.0


def thread_candidates() -> list[int]:
    """CPU thread counts worth measuring: powers of two, leaving one core to the caller, who waits
    spinning.
    """
    physical = psutil.cpu_count(logical=False) or 1
    cores = min(int(hardware()["cores"]), physical)
    counts = [1]
    while counts[-1] * 2 <= cores - 1:
        counts.append(counts[-1] * 2)
    return sorted({*counts, max(1, cores - 1)})


def shared_threads() -> int:
    """Threads of a backend that computes on torch's own pool: as many as torch has, no other pool
    wants the cores.
    """
    return torch.get_num_threads()


def ensure_profile(
    weights: LayerWeights,
    backend: str,
    make_cpu: MakeCPU,
    accelerator: SlotAccelerator | None,
    *,
    threads: int | None = None,
    progress: bool = True,
    refresh: bool = False,
) -> MachineProfile:
    """The stored profile for this hardware, backend and expert shape; measured first where there is
    none.

    A damaged profile is measured again, with a notice. What was measured while other programs used
    the cores is for this run alone: the next one measures again. `HYBRIMOE_BUSY=keep` stores it all
    the same, for machines that are never quiet.
    """
    kind = "none" if accelerator is None else accelerator.name
    path = profile_path(weights.spec, backend, kind, threads)
    if not refresh:
        kept = _kept(path, weights.spec, threads, accelerator is not None)
        if kept is not None:
            return kept
    noise = Noise()
    text = calibrate(
        weights, make_cpu, accelerator, threads=threads, progress=progress, median=noise.median
    ).to_json()
    disturbed = noise.verdict()
    if disturbed and os.environ.get("HYBRIMOE_BUSY") != "keep":
        log.warning(
            "%s; these times serve this run only and are measured again at the next start "
            "(HYBRIMOE_BUSY=keep stores them)",
            disturbed,
        )
        return MachineProfile.from_json(text)
    try:
        write_atomic(path, text)
    except OSError as error:
        log.warning(
            "%s cannot be written (%s); the machine is measured again next time",
            path,
            error.strerror or error,
        )
    return MachineProfile.from_json(text)


def _kept(
    path: Path, spec: ExpertSpec, threads: int | None, accelerated: bool
) -> MachineProfile | None:
    """The stored profile; None where there is none, or, with a notice, where it was not measured
    here.
    """
    if not os.path.exists(path):  # not Path.exists, which raises where a folder cannot be searched
        return None
    try:
        profile = load_profile(path)
        if profile.spec != spec or (profile.accelerator is not None) != accelerated:
            raise ProfileError(f"{path}: the profile of other experts or of another device")
        most = max(thread_candidates()) if threads is None else threads
        if not 1 <= (profile.cpu.threads or 1) <= most:
            raise ProfileError(
                f"{path}: made for {profile.cpu.threads} threads where {most} are possible"
            )
    except ProfileError as error:
        log.warning("%s; measuring again", error)
        return None
    return profile


def profile_path(spec: ExpertSpec, backend: str, accelerator: str, threads: int | None) -> Path:
    """File name that changes with everything the measurement depends on."""
    facts = json.dumps(
        [hardware(), versions(), asdict(spec), backend, accelerator, threads], sort_keys=True
    )
    folder = Path(os.environ.get("HYBRIMOE_PROFILES") or cache_dir() / "profiles")
    return folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:20]}.json"


def calibrate(
    weights: LayerWeights,
    make_cpu: MakeCPU,
    accelerator: SlotAccelerator | None,
    *,
    threads: int | None = None,
    progress: bool = True,
    median: Median = statistics.median,
) -> MachineProfile:
    """Measure one layer's experts: CPU time by threads, loads and number of experts, accelerator
    time, link.

    Args:
        median: of the times of one call's repetitions.
    """
    counts = thread_candidates() if threads is None else [threads]
    with tqdm(total=len(counts) + 2, desc="calibrating", disable=not progress, leave=False) as bar:
        best, cpu = _choose_threads(weights, make_cpu, counts, bar, median)
        try:
            with _quiet_torch(cpu):
                side = _measure_cpu(weights, cpu, best, median)
        finally:
            cpu.close()
        bar.update()
        accelerated, link, notes = _measure_accelerator(weights, accelerator, median)
        bar.update()
    return MachineProfile(
        name="this machine",
        label="emulated"
        if accelerator is not None and accelerator.name == "emulated"
        else "measured",
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        spec=weights.spec,
        cpu=side,
        accelerator=accelerated,
        link=link,
        between_layers_us=0.0,
        hardware=hardware(),
        versions=versions(),
        notes=notes,
    )


@contextmanager
def _quiet_torch(cpu: CPUBackend) -> Iterator[None]:
    """One torch thread while workers of their own are measured: they would fight for the cores."""
    before = torch.get_num_threads()
    if cpu.workers:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _choose_threads(
    weights: LayerWeights, make_cpu: MakeCPU, counts: Sequence[int], bar: Any, median: Median
) -> tuple[int, CPUBackend]:
    """The thread count with the fastest decode call; decode is what waits for the CPU most."""
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
    return best[1], best[2]


def _measure_cpu(weights: LayerWeights, cpu: CPUBackend, threads: int, median: Median) -> Side:
    """Time per expert at each load, and what the first expert costs beyond it.

    One call of n experts takes `first + n * expert`: two values of n give both.
    """
    spec = weights.spec
    few, many = 1, max(2, min(8, spec.experts))
    tokens: list[int] = []
    us: list[float] = []
    first = 0.0
    started = time.perf_counter()
    for load in LOADS:
        small = _cpu_call(weights, cpu, few, load, median)
        most = (
            min(many, spec.top_k) if load == 1 < spec.top_k else many
        )  # in decode it is one token with its experts
        large = _cpu_call(weights, cpu, most, load, median)
        each = max((large - small) / (most - few), 0.05 * small / few)
        if load == 1:
            first = max(0.0, small - few * each)
        tokens.append(load)
        us.append(each)
        if time.perf_counter() - started > BUDGET_S:
            break
    return Side(first, tuple(tokens), tuple(us), threads)


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
    tokens, each = (1, experts) if load == 1 and experts <= spec.top_k else (load * experts, 1)
    hidden = torch.randn(tokens, spec.hidden, dtype=torch.bfloat16)
    # Different experts from call to call, so that their weights come from memory as they do in a
    # model.
    shifts = [(turn * experts) % spec.experts for turn in range(repeats + 1)]
    routing = torch.ones(tokens, each)
    times = []
    for shift in shifts:
        chosen = [(shift + index) % spec.experts for index in range(experts)]
        ids = torch.tensor(chosen).repeat_interleave(load).view(tokens, each)
        start = time.perf_counter_ns()
        cpu.submit(0, hidden, ids, routing, chosen)
        cpu.sync()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return median(times[1:])


def _measure_accelerator(
    weights: LayerWeights, accelerator: SlotAccelerator | None, median: Median
) -> tuple[Side | None, Link | None, tuple[str, ...]]:
    spec = weights.spec
    if accelerator is None:
        return None, None, ()
    if accelerator.name == "emulated":
        reading = spec.expert_bytes / (ASSUMED_ACCELERATOR_GBPS * 1e3)
        each = 6.0 * spec.hidden * spec.intermediate / (ASSUMED_ACCELERATOR_GFLOPS * 1e3)
        loads = (1, 64, 1024)
        side = Side(ASSUMED_LAUNCH_US, loads, tuple(reading + load * each for load in loads))
        note = (
            f"accelerator and link are assumed: {ASSUMED_LINK.gbps} GB/s, "
            f"{ASSUMED_ACCELERATOR_GBPS} GB/s of weights, "
            f"{ASSUMED_ACCELERATOR_GFLOPS / 1e3:.0f} TFLOP/s"
        )
        return side, ASSUMED_LINK, (note,)
    return (*_measure_cuda(weights, accelerator, median), ())


def _measure_cuda(
    weights: LayerWeights, accelerator: SlotAccelerator, median: Median = statistics.median
) -> tuple[Side, Link]:
    """Time slots and link with the engine's own calls, from submission to synchronisation.

    Differences between many and one give what each more costs. Calls rotate over the slots, so that
    weights come from the device's memory and not from its cache.
    """
    spec, device = weights.spec, accelerator.device
    slots = min(spec.experts, _CUDA_SLOTS)
    many = max(2, min(8, slots // 2))
    accelerator.allocate(slots, [weights])
    turns = cycle(range(slots))

    def onload(count: int) -> None:
        for slot in islice(turns, count):
            accelerator.onload(slot, weights, slot)

    onload(slots)
    one, more = (
        _timed(accelerator, lambda: onload(1), median),
        _timed(accelerator, lambda: onload(many), median),
    )
    # Transfers queue up behind one another: what each more takes has its share of latency in it.
    link = Link(spec.expert_bytes / (max((more - one) / (many - 1), 0.05 * one) * 1e3), 0.0)
    tokens, us, first = [], [], 0.0
    for load in LOADS:
        hidden = torch.randn(load, spec.hidden, dtype=torch.bfloat16, device=device)

        def compute(count: int, hidden: torch.Tensor = hidden, load: int = load) -> None:
            group = tuple(islice(turns, count))
            ids = accelerator.place(torch.tensor([group]).expand(load, count).contiguous())
            accelerator.compute(group, hidden, ids, torch.ones(load, count, device=device))

        one, more = (
            _timed(accelerator, lambda: compute(1), median),
            _timed(accelerator, lambda: compute(many), median),
        )
        tokens.append(load)
        us.append(max((more - one) / (many - 1), 0.05 * one))
        if load == 1:
            first = max(0.0, one - us[0])
    return Side(first, tuple(tokens), tuple(us)), link


def _timed(accelerator: SlotAccelerator, call: Callable[[], object], median: Median) -> float:
    times = []
    for _ in range(4 * REPEATS):
        start = time.perf_counter_ns()
        call()
        accelerator.synchronize()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return median(times[REPEATS:])
