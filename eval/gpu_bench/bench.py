"""The MoE layers of one model on one machine, shared by the systems of `eval.cuda`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from eval.models.layers import layers_of
from eval.models.routing import published_costs, routing
from eval.models.shapes import Model, fits
from eval.policies.systems import System, quotas
from hybrimoe_plugin.compute.backends import CPUBackend
from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.device.memory import free_host_bytes
from hybrimoe_plugin.engine import Engine, SimulatedClock, WallClock
from hybrimoe_plugin.engine.cpu_choice import choose_cpu, make_cpu
from hybrimoe_plugin.engine.sizing import staging_slots
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.prefetch import make_prefetcher
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.replay.trace import Call
from hybrimoe_plugin.weights.layer_weights import LayerWeights

DEVICE = "cuda:0"
CPU_THREADS = 10
RECALL = 0.8
"""Of modelled predictions for the next layer, where the routing has no recorded ones."""


class Bench:
    """One model on one machine: what all systems share.

    Args:
        dry: emulated accelerator, small matrices.
        layers: most layers; by default as many as half of the free memory holds.
    """

    def __init__(self, model: Model, dry: bool, quick: bool, layers: int | None = None) -> None:
        self.model = model
        self.dry = dry
        self.quick = quick
        self.device = torch.device("cpu" if dry else DEVICE)
        prompt_tokens, steps = (128, 64)
        if quick:
            prompt_tokens, steps = (32, 12)
        self.routing = routing(model, prompt_tokens, steps, look_ahead=3, recall=RECALL)
        header = self.routing.header
        count = self._layers_that_fit()
        if layers is not None:
            count = min(count, layers)
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
            sizes = [layer.spec.expert_bytes for layer in self.layers]
            self.expert_bytes = statistics.mean(sizes)
            self.costs, self.cpu = machine(self.layers, self.accelerator)
        for layer in self.layers:
            self.cpu.add_layer(layer)

    def _layers_that_fit(self) -> int:
        most = len(self.routing.prompts[0])
        if self.dry:
            return min(most, 3 if self.quick else 12)
        # Half of the free memory: where pages cannot be registered, staging and the page cache need
        # their part.
        room = 0.5 * free_host_bytes()
        return fits(self.model, self.routing.header.experts, most, room)

    def engine(self, system: System, ratio: float) -> Engine:
        """The engine that a user's settings would make, on the shared backends."""
        settings = Settings.of(system.settings)
        controller = self._controller(settings, ratio, system.split)
        self.accelerator.allocate(controller.pool.slots, self.layers)
        look_ahead = settings.look_ahead
        if settings.prefetch == "off":
            look_ahead = 0
        routers = [_TraceRouter() for _ in self.layers]
        clock = SimulatedClock() if self.dry else WallClock()
        return Engine(
            self.layers, routers, controller, self.cpu, self.accelerator, clock, look_ahead
        )

    def _controller(self, settings: Settings, ratio: float, split: bool) -> Controller:
        count = len(self.layers)
        experts, top_k = self.routing.header.experts, self.routing.header.top_k
        shares = quotas(ratio, count, experts, split)
        scheduler = make_scheduler(settings.scheduler, self.costs, True)
        pool = SlotPool(shares, staging_slots(sum(shares)), settings.budget == "shared")
        cache = make_cache(settings.cache, count, experts, top_k, settings, self.popularity)
        return Controller(
            pool,
            self.costs,
            scheduler,
            scheduler,
            cache,
            make_prefetcher(settings.prefetch, scheduler),
            round(self.expert_bytes),
        )

    def run(self, engine: Engine, calls: Sequence[Call]) -> float:
        """Time of one pass through all layers, in us."""
        tokens = len(calls[0].ids)
        width = self.layers[0].spec.hidden
        dtype = torch.float32 if self.dry else torch.bfloat16
        hidden = torch.randn(tokens, width, dtype=dtype, device=self.device)
        inputs = [self._inputs(call) for call in calls[: len(self.layers)]]
        self.accelerator.synchronize()
        started = time.perf_counter_ns()
        simulated = engine.clock.now_us()
        for given in inputs:
            _TraceRouter.show(engine, given)
            part = engine.run(given.layer, hidden, given.ids, given.weights)
            hidden = F.rms_norm(hidden + part, (width,))
        self.accelerator.synchronize()
        if self.dry:
            return engine.clock.now_us() - simulated
        return (time.perf_counter_ns() - started) / 1e3

    def _inputs(self, call: Call) -> _Inputs:
        arrays = (call.ids, call.weights, *call.predicted)
        placed = [self.accelerator.copy_to_device(torch.from_numpy(array)) for array in arrays]
        ids, weights, *predicted = placed
        return _Inputs(call.layer, ids, weights, predicted)

    def close(self) -> None:
        """End the backends' threads, and free the slots."""
        self.cpu.close()
        self.accelerator.close()


class _Inputs(NamedTuple):
    """What a model would have computed by a layer's call, on the device before the clock starts."""

    layer: int
    ids: torch.Tensor
    weights: torch.Tensor
    predicted: list[torch.Tensor]
    """[T, K] int64 for each of the next layers, nearest first."""


class _TraceRouter:
    """A router that predicts what the trace says."""

    def __init__(self) -> None:
        self.predicted: torch.Tensor | None = None

    @staticmethod
    def show(engine: Engine, given: _Inputs) -> None:
        """Let the next layers' routers predict what this call's record says."""
        following = engine.routers[given.layer + 1 :]
        for router, ids in zip(following, given.predicted, strict=False):
            assert isinstance(router, _TraceRouter)
            router.predicted = ids

    def scores(self) -> torch.Tensor | None:
        return None

    @property
    def predicts(self) -> bool:
        return True

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.predicted is not None
        return self.predicted


def machine(
    layers: Sequence[LayerWeights], accelerator: SlotAccelerator
) -> tuple[CostModel, CPUBackend]:
    """This machine's measured costs, and the CPU backend that a user would get."""
    cores = min(CPU_THREADS, len(os.sched_getaffinity(0)))
    threads = max(1, cores - 1)  # the caller is the tenth
    settings = Settings(cpu_threads=threads)
    backend, profile = choose_cpu(settings, layers, accelerator, progress=False, refresh=True)
    costs = profile.costs(layers[0].spec)
    return costs, make_cpu(backend, threads, alone=False)


def limit_cpu() -> None:
    """Limit this process and its workers to ten cores."""
    cores = sorted(os.sched_getaffinity(0))[:CPU_THREADS]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
