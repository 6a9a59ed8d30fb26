"""On one NVIDIA GPU: roofline, then four systems at three cache sizes, prefill and decode of shape-accurate models.

`python -m eval.throughput --device cuda` comes here. The models are MoE layers only (`eval.cuda_model` has the rest of
a model too), driven by given routing, recorded or generated as the column says; the CPU is limited to ten threads.
Without a CUDA device it is a dry run: the same code on the emulated accelerator with small matrices, times from the
simulated clock and the published profile of the paper's machine, and `emulated` true.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from eval import cuda_bandwidth, report, traces
from eval.cuda_bandwidth import Bandwidths
from eval.shapes import MODELS, Model, fits, layers_of, routing
from eval.systems import KTRANSFORMERS, OURS, PUBLISHED, System, quotas
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.engine import Engine, SimulatedClock, WallClock
from hybrimoe_plugin.experts.base import CPUBackend
from hybrimoe_plugin.experts.calibrate import calibrate
from hybrimoe_plugin.experts.cpu_torch import TorchExperts
from hybrimoe_plugin.experts.memory import free_host_bytes, staging_slots
from hybrimoe_plugin.experts.slot_accelerator import SlotAccelerator, cuda_refusal, make_accelerator
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.prefetch import make_prefetcher
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.replay.trace import Call

log = logging.getLogger(__name__)

LOAD_EVERY_MISS = System(
    "load every miss, LRU", {"scheduler": "accelerator_only", "cache": "lru", "budget": "layer", "prefetch": "off"}
)
SYSTEMS = (KTRANSFORMERS, LOAD_EVERY_MISS, PUBLISHED, OURS)
RATIOS = (0.25, 0.5, 0.75)
PHASES = ("prefill", "decode")
DEVICE = "cuda:0"
CPU_THREADS = 10
RECALL = 0.8
"""Of modelled predictions for the next layer; the routing has no recorded ones."""
REPEATS = 20
"""Prompts, and the fewest decode steps that count."""
CELL_SECONDS = 8.0
"""Decode of one cell stops after this."""


class Bench:
    """One model on one machine: what all systems share.

    Args:
        dry: emulated accelerator, small matrices.
    """

    def __init__(self, model: Model, dry: bool, quick: bool) -> None:
        self.model, self.dry, self.quick = model, dry, quick
        self.device = torch.device("cpu" if dry else DEVICE)
        self.routing = routing(model, *((32, 12) if quick else (128, 64)), look_ahead=3, recall=RECALL)
        header, most = self.routing.header, len(self.routing.prompts[0])
        # Half of what is free: where pages cannot be registered, staging and the page cache want their part.
        count = min(most, 3 if quick else 12) if dry else fits(model, header.experts, most, 0.5 * free_host_bytes())
        self.layers = layers_of(model, header, count, dry)
        made = make_accelerator("emulated" if dry else "cuda", self.device)
        assert made is not None
        self.accelerator: SlotAccelerator = made
        self.expert_bytes = float(header.expert_bytes)
        self.costs: CostModel
        self.cpu: CPUBackend
        trace = traces.real(model.trace) if model.trace in traces.REAL else traces.flat(model.trace, 16, 4, 0)
        self.popularity = traces.other_text(trace, model.trace)[:count]
        if dry:
            self.costs = traces.costs_for("a6000", trace, model.trace)
            self.cpu = TorchExperts(keep=True)
        else:
            self.expert_bytes = statistics.mean(layer.spec.expert_bytes for layer in self.layers)
            threads = max(1, min(CPU_THREADS, len(os.sched_getaffinity(0))) - 1)  # the caller is the tenth
            profile = calibrate(self.layers[0], _kt, self.accelerator, threads=threads, progress=False)
            self.costs = profile.costs(self.layers[0].spec)
            self.cpu = _kt(threads)
        for layer in self.layers:
            self.cpu.add_layer(layer)

    def engine(self, system: System, ratio: float) -> Engine:
        """The engine that a user's settings would make, on the shared backends."""
        settings, header, count = Settings.of(system.settings), self.routing.header, len(self.layers)
        scheduler = make_scheduler(settings.scheduler, self.costs, True)
        shares = quotas(ratio, count, header.experts, system.split)
        controller = Controller(
            SlotPool(shares, staging_slots(sum(shares)), settings.budget == "shared"),
            self.costs,
            scheduler,
            scheduler,
            make_cache(settings.cache, count, header.experts, header.top_k, settings, self.popularity),
            make_prefetcher(settings.prefetch, scheduler, self.costs),
            round(self.expert_bytes),
        )
        self.accelerator.allocate(controller.pool.slots, self.layers)
        look_ahead = 0 if settings.prefetch == "off" else settings.look_ahead
        routers = [_TraceRouter() for _ in self.layers]
        clock = SimulatedClock() if self.dry else WallClock()
        return Engine(self.layers, routers, controller, self.cpu, self.accelerator, clock, look_ahead)

    def run(self, engine: Engine, calls: Sequence[Call]) -> float:
        """Time of one pass through all layers, in us."""
        tokens, width = len(calls[0].ids), self.layers[0].spec.hidden
        dtype = torch.float32 if self.dry else torch.bfloat16
        hidden = torch.randn(tokens, width, dtype=dtype, device=self.device)
        inputs = [self._inputs(engine, call) for call in calls[: len(self.layers)]]
        self.accelerator.synchronize()
        started, simulated = time.perf_counter_ns(), engine.clock.now_us()
        for call, (ids, weights) in zip(calls, inputs, strict=False):
            _TraceRouter.show(engine, call, self.device)
            hidden = F.rms_norm(hidden + engine.run(call.layer, hidden, ids, weights), (width,))
        self.accelerator.synchronize()
        if self.dry:
            return engine.clock.now_us() - simulated
        return (time.perf_counter_ns() - started) / 1e3

    def _inputs(self, engine: Engine, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(call.ids).to(self.device), torch.from_numpy(call.weights).to(self.device)

    def close(self) -> None:
        self.cpu.close()
        self.accelerator.close()


class _TraceRouter:
    """A router that gives what the trace says; predictions are put on the device before the call."""

    def __init__(self) -> None:
        self.predicted: torch.Tensor | None = None

    @staticmethod
    def show(engine: Engine, call: Call, device: torch.device) -> None:
        for distance, ids in enumerate(call.predicted, 1):
            if call.layer + distance < len(engine.routers):
                router: Any = engine.routers[call.layer + distance]
                router.predicted = torch.from_numpy(ids).to(device, non_blocking=True)

    def scores(self) -> torch.Tensor | None:
        return None

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.predicted is not None
        return self.predicted


class Timing(NamedTuple):
    """One cell's phase."""

    us: list[float]
    counts: Counters


def measure(bench: Bench, system: System, ratio: float) -> dict[str, Timing]:
    """Both phases of one system at one cache size; warm-up is one prompt and four tokens."""
    engine = bench.engine(system, ratio)
    prompts, decode = bench.routing.prompts, bench.routing.decode
    for calls in (prompts[-1], *decode[:4]):
        bench.run(engine, calls)
    found = {}
    for phase in PHASES:
        before, us, started = engine.controller.counters.snapshot(), [], time.perf_counter()
        repeats = (3 if bench.quick else REPEATS) if phase == "prefill" else len(decode)
        for turn in range(repeats):
            us.append(bench.run(engine, prompts[turn % len(prompts)] if phase == "prefill" else decode[turn]))
            if len(us) >= REPEATS and time.perf_counter() - started > CELL_SECONDS:
                break
        found[phase] = Timing(us, engine.controller.counters.since(before))
    return found


def roofline_us(bench: Bench, bandwidths: Bandwidths, counts: Counters, passes: int) -> float:
    """Least time of one pass: every expert's bytes once, misses over CPU and link together, all of it overlapped."""
    needed = counts.activations * bench.expert_bytes / passes
    missing = needed * (1.0 - counts.hit_rate)
    shared = missing / (bandwidths.cpu + bandwidths.link)
    return max(shared, needed / (bandwidths.cpu + bandwidths.accelerator))


def rows_of(bench: Bench, bandwidths: Bandwidths) -> list[dict[str, Any]]:
    """One row for each cache size, system and phase."""
    rows = []
    for ratio in RATIOS:
        for system in SYSTEMS:
            for phase, timing in measure(bench, system, ratio).items():
                low, middle, high = statistics.quantiles(timing.us, n=10)[1::3] if len(timing.us) > 1 else timing.us * 3
                rows.append(
                    {
                        "model": bench.model.name,
                        "layers": len(bench.layers),
                        "routing": bench.routing.header.source,
                        "cache": ratio,
                        "method": system.name,
                        "phase": phase,
                        "tokens": len(bench.routing.prompts[0][0].ids) if phase == "prefill" else 1,
                        "p20_ms": low / 1e3,
                        "p50_ms": statistics.median(timing.us) / 1e3,
                        "p80_ms": high / 1e3,
                        "repetitions": len(timing.us),
                        "roofline_ms": roofline_us(bench, bandwidths, timing.counts, len(timing.us)) / 1e3,
                        "hit_rate": timing.counts.hit_rate,
                        "link_mb_per_pass": timing.counts.link_bytes / len(timing.us) / 1e6,
                        "emulated": bench.dry,
                    }
                )
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Speed-ups and roofline share, from the rows' medians."""
    times = {(row["model"], row["cache"], row["phase"], row["method"]): row for row in rows}
    cells = {(row["model"], row["cache"], row["phase"]) for row in rows}
    ours = {cell: times[(*cell, OURS.name)] for cell in cells}

    def gain(cell: tuple[Any, ...], system: System) -> float:
        return float(times[(*cell, system.name)]["p50_ms"] / ours[cell]["p50_ms"])

    result = {
        f"{phase}_speedup_geomean": statistics.geometric_mean(
            gain(cell, KTRANSFORMERS) for cell in cells if cell[2] == phase
        )
        for phase in ("decode", "prefill")
    }
    result["worst_cell_vs_any_baseline"] = min(
        gain(cell, system) for cell in cells for system in SYSTEMS if system is not OURS
    )
    shares = [row["roofline_ms"] / row["p50_ms"] for cell, row in ours.items() if cell[2] == "decode"]
    result["roofline_share"] = statistics.geometric_mean(shares)
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole question; `args` has `out` and `quick`. Gives what the JSON line says."""
    reason = cuda_refusal()
    dry = reason is not None
    if dry:
        log.warning("dry run on the emulated accelerator, no number is a measurement: %s", reason)
        torch.set_num_threads(1)  # tiny operations: more threads only wait for one another
    else:
        _limit_cpu()
    rows: list[dict[str, Any]] = []
    roofs: list[dict[str, Any]] = []
    for model in MODELS:
        bench = Bench(model, dry, args.quick)
        try:
            bandwidths = cuda_bandwidth.bandwidths(bench.costs, bench.expert_bytes, None if dry else bench.device)
            shares = {} if dry else cuda_bandwidth.shares(bench.accelerator, bench.layers, bandwidths)
            roofs.append({"model": model.name, **bandwidths.row(), **shares, "note": model.note, "emulated": dry})
            report.show(f"{model.name}: bandwidths{' (emulated)' if dry else ''}", roofs[-1:])
            rows += rows_of(bench, bandwidths)
        finally:
            bench.close()
    report.show(f"Times{', emulated' if dry else ', measured'}", [_short(row) for row in rows])
    report.save_csv(args.out / "cuda.csv", [{**row, "driver": cuda_bandwidth.driver()} for row in rows])
    report.save_csv(args.out / "cuda_bandwidth.csv", [{**row, "driver": cuda_bandwidth.driver()} for row in roofs])
    least = {
        name: None if dry else min(row[name] for row in roofs) for name in ("link_share", "kernel_bandwidth_share")
    }
    result = {**summary(rows), **least, "emulated": dry}
    report.finish(result)
    return result


def _short(row: dict[str, Any]) -> dict[str, Any]:
    names = ("model", "cache", "method", "phase", "p20_ms", "p50_ms", "p80_ms", "roofline_ms", "hit_rate")
    return {name: row[name] for name in names}


def _kt(threads: int) -> CPUBackend:
    from hybrimoe_plugin.experts.cpu_kt import KTExperts

    return KTExperts(threads)


def _limit_cpu() -> None:
    """Ten cores for this process and its workers."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPU_THREADS])
    torch.set_num_threads(min(CPU_THREADS, len(os.sched_getaffinity(0))))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """`python -m eval.cuda`, the same as `python -m eval.throughput --device cuda`."""
    logging.basicConfig(level=logging.WARNING)
    return run(report.parser(__doc__ or "").parse_args(arguments))


if __name__ == "__main__":
    main()
