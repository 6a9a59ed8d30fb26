"""One system on one whole model, loaded and driven by given routing."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.cuda_model.routers import GivenGate, GivenRouter
from eval.gpu_bench.bench import CPU_THREADS
from eval.models.routing import Routing
from eval.policies.systems import System
from hybrimoe_plugin.compute.attention.kv_cache import cache_in, cache_name
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.decode.connect import connect_layers
from hybrimoe_plugin.decode.graphed_layer import GraphedLayer
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.replay.trace import Call

WARM_UP = 6
"""Decode steps that do not count; CUDA graphs are captured and checked in the first two."""
PROMPT_REPEATS = 5


class Subject:
    """One system on one model, loaded.

    Args:
        path: the model's file.
        given: the routing that will be given.
        dry: emulated accelerator instead of a GPU.
    """

    def __init__(self, path: Path, system: System, ratio: float, given: Routing, dry: bool) -> None:
        from hybrimoe_plugin import load_model

        self.dry = dry
        settings = {**_machine_settings(dry), **system.settings}
        self.model, _ = load_model(None, path, progress=False, cache_ratio=ratio, **settings)
        (self.engine,) = self.model.hybrimoe.engines
        self._keyword = cache_name(self.model)
        self.gates: list[GivenGate] = []
        self._replace_routers(given.header.top_k)
        connect_layers(self.model, self.model.hybrimoe.turns)
        self._place(Settings.of(system.settings), given)

    def _replace_routers(self, top_k: int) -> None:
        from hybrimoe_plugin.hosts.transformers.preparation.places import experts_operators

        for place, operator in enumerate(experts_operators(self.model)):
            block: Any = self.model.get_submodule(operator.key.rpartition(".")[0])
            old: Any = self.engine.routers[place]
            old.detach()
            block.gate = GivenGate(block.gate, top_k)
            self.gates.append(block.gate)
            self.engine.routers[place] = GivenRouter(block.gate)

    def _place(self, settings: Settings, given: Routing) -> None:
        """Start with the experts that are most popular in other text, as in `eval.cuda`."""
        controller = self.engine.controller
        layers = len(self.gates)
        popularity = given.popularity[:layers]
        experts = self.engine.layers[0].spec.experts
        top_k = given.header.top_k
        controller.restart(make_cache(settings.cache, layers, experts, top_k, settings, popularity))
        for move in controller.warm_start():
            layer = self.engine.layers[move.layer]
            self.engine.accelerator.onload(move.slot, layer, move.expert)

    def run(self, calls: Sequence[Call], cache: Any) -> tuple[float, Any]:
        """(time in us, KV cache) of one pass."""
        for call in calls[: len(self.gates)]:
            self._tell(call)
        ids = torch.randint(3, 250, (1, len(calls[0].ids)), device=self.model.device)
        started, simulated = self._now()
        kept = {self._keyword: cache}
        out = self.model(ids, **kept, use_cache=True, logits_to_keep=1)
        ended, later = self._now()
        spent = later - simulated if self.dry else ended - started
        return spent, cache_in(out)

    def _tell(self, call: Call) -> None:
        self.gates[call.layer].tell(call)
        following = call.layer + 1
        if call.predicted and following < len(self.gates):
            self.engine.routers[following].tell(torch.from_numpy(call.predicted[0]))

    def _now(self) -> tuple[float, float]:
        """(wall clock, engine's clock) in us, once the device is idle."""
        self.engine.accelerator.synchronize()
        return time.perf_counter_ns() / 1e3, self.engine.clock.now_us()

    @property
    def captured(self) -> int:
        """Number of layers that run as CUDA graphs."""
        layers = [module for module in self.model.modules() if isinstance(module, GraphedLayer)]
        return sum(layer.captured for layer in layers)

    def close(self) -> None:
        """Give the model back as it was before the injection."""
        self.model.hybrimoe.restore()


class Timing(NamedTuple):
    """Times of one subject."""

    prefill_us: list[float]
    decode_us: list[float]
    hit_rate: float
    first_hit_rate: float
    """Of the decode steps right behind a prompt, which do not count otherwise."""
    captured: int


@torch.no_grad()
def measure(subject: Subject, given: Routing) -> Timing:
    """Time prompts, each with an empty KV cache, then decode steps that follow the last one."""
    prefill, decode = [], []
    cache = None
    for turn in range(PROMPT_REPEATS + 1):
        calls = given.prompts[turn % len(given.prompts)]
        us, cache = subject.run(calls, None)
        prefill.append(us)
    counters = subject.engine.controller.counters
    before = counters.snapshot()
    first = 0.0
    for number, calls in enumerate(given.decode):
        us, cache = subject.run(calls, cache)
        if number == WARM_UP - 1:
            first = counters.since(before).hit_rate
            before = counters.snapshot()
        decode.append(us)
    counts = counters.since(before)
    return Timing(prefill[1:], decode[WARM_UP:], counts.hit_rate, first, subject.captured)


def _machine_settings(dry: bool) -> dict[str, Any]:
    """Settings that depend on the machine and not on the system under test."""
    if dry:
        return {
            "accelerator": "emulated",
            "dense": "dequantised",
            "cpu_backend": "torch",
            "dtype": "float32",
            "profile": "a6000-deepseek-v2-lite",
        }
    threads = min(CPU_THREADS, len(os.sched_getaffinity(0))) - 1
    return {"accelerator": "cuda", "cpu_threads": threads}
