"""One model's MoE layers on one machine, real or emulated, as the systems of `eval.cuda` share them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from eval.shapes import Model, fits, layers_of, published_costs, routing
from eval.systems import System, quotas
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.engine import Engine, SimulatedClock, WallClock
from hybrimoe_plugin.experts.base import CPUBackend
from hybrimoe_plugin.experts.cpu_torch import TorchExperts
from hybrimoe_plugin.experts.memory import free_host_bytes, staging_slots
from hybrimoe_plugin.experts.slot_accelerator import SlotAccelerator, make_accelerator
from hybrimoe_plugin.experts.weights import LayerWeights
from hybrimoe_plugin.operators.bind import choose_cpu, make_cpu
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.prefetch import make_prefetcher
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.replay.trace import Call

DEVICE = "cuda:0"
CPU_THREADS = 10
RECALL = 0.8
"""Of modelled predictions for the next layer, where the routing has no recorded ones."""


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
        self.popularity = self.routing.popularity[:count]
        if dry:
            self.costs = published_costs(model)
            self.costs.between_layers_us = 0.0  # as here on a GPU: one MoE layer follows another
            self.cpu = TorchExperts(keep=True)
        else:
            self.expert_bytes = statistics.mean(layer.spec.expert_bytes for layer in self.layers)
            self.costs, self.cpu = machine(self.layers, self.accelerator)
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


def machine(layers: Sequence[LayerWeights], accelerator: SlotAccelerator) -> tuple[CostModel, CPUBackend]:
    """What this machine takes, measured, and the CPU backend that a user would get."""
    threads = max(1, min(CPU_THREADS, len(os.sched_getaffinity(0))) - 1)  # the caller is the tenth
    settings = Settings(cpu_threads=threads)
    backend, profile = choose_cpu(settings, layers, accelerator, progress=False, refresh=True)
    return profile.costs(layers[0].spec), make_cpu(backend, threads, alone=False)


def limit_cpu() -> None:
    """Ten cores for this process and its workers."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPU_THREADS])
    torch.set_num_threads(min(CPU_THREADS, len(os.sched_getaffinity(0))))
