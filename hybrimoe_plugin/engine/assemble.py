"""Build an engine from layers and settings: size its cache, choose backends, connect policies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.compute.gpu.slot_kernels import staying
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.core import ExpertSpec
from hybrimoe_plugin.device.machine import cuda_refusal
from hybrimoe_plugin.engine.clock import SimulatedClock, WallClock
from hybrimoe_plugin.engine.cpu_choice import choose_cpu, cpu_for
from hybrimoe_plugin.engine.engine import Engine
from hybrimoe_plugin.engine.sizing import quotas_beside, staging_slots
from hybrimoe_plugin.engine.view import Router
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.prefetch import make_prefetcher
from hybrimoe_plugin.policy.profile import MachineProfile
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.weights.layer_weights import LayerWeights

log = logging.getLogger(__name__)


class Devices(NamedTuple):
    """Where a rule wants prompts and answers to be computed: `cpu`, `cuda`, `cuda:N` or `auto`."""

    prefill: str
    generate: str


def build_engine(
    layers: Sequence[LayerWeights],
    routers: Sequence[Router],
    settings: Settings,
    devices: Devices,
    *,
    others: Sequence[Engine] = (),
    kernels: Callable[[], Ggml],
    free_bytes: int | None = None,
    kept_bytes: int = 0,
    progress: bool = True,
) -> tuple[Engine, MachineProfile]:
    """An engine for these MoE layers, with its cache sized and its machine measured.

    Args:
        routers: of each layer.
        devices: where prompts and answers are to be computed.
        others: the model's engines so far, whose CPU workers this one may share.
        kernels: gives the ggml kernels that the model's other operators use.
        free_bytes: accelerator memory for experts; default what is free now on its device.
        kept_bytes: of that, what attention's cache will still take.
        progress: show a bar while the machine is measured for the first time.

    Raises:
        ConfigError, BudgetError, BackendError: settings that cannot be met.
    """
    kind, device = accelerator_kind(settings, devices)
    accelerator = make_accelerator(kind, device, settings.kernels, activations=settings.activations)
    quotas = [0] * len(layers)
    on_cpu: dict[int, str] = {}
    if accelerator is not None:
        on_cpu = accelerator.on_cpu(layers)
        if on_cpu:
            log.warning("%s", staying(on_cpu, layers))
        if kind == "cuda" and free_bytes is None:
            # The dense weights are there already; attention's cache is not, and grows until the
            # context is full.
            free_now, _ = torch.cuda.mem_get_info(device)
            free_bytes = max(0, free_now - kept_bytes)
        expert_bytes = [weights.spec.expert_bytes for weights in layers]
        quotas = quotas_beside(on_cpu, settings, layers[0].spec.experts, expert_bytes, free_bytes)

    # The machine is measured with the first: one that the accelerator computes.
    by_place = sorted(range(len(layers)), key=lambda layer: layer in on_cpu)
    measured = [layers[layer] for layer in by_place]
    backend, profile = choose_cpu(
        settings, measured, accelerator, progress=progress, first=not others
    )
    spec = measured[0].spec
    pool = SlotPool(quotas, staging_slots(sum(quotas)), settings.budget == "shared", on_cpu)
    controller = _controller(settings, layers, pool, profile.costs(spec), kind, devices, spec)

    threads = settings.cpu_threads or profile.cpu.threads or 1
    cpu = cpu_for(backend, threads, others, alone=accelerator is None)
    if isinstance(cpu, GgmlExperts):
        cpu.share(kernels())
        cpu.repack &= settings.weights != "mapped"
    for weights in layers:
        cpu.add_layer(weights)
    if accelerator is not None:
        accelerator.allocate(controller.pool.slots, layers)

    clock = SimulatedClock() if kind == "emulated" else WallClock()
    look_ahead = 0 if settings.prefetch == "off" else settings.look_ahead
    verify = settings.verify == "slots"
    engine = Engine(layers, routers, controller, cpu, accelerator, clock, look_ahead, verify)
    return engine, profile


def _controller(
    settings: Settings,
    layers: Sequence[LayerWeights],
    pool: SlotPool,
    costs: CostModel,
    kind: str,
    devices: Devices,
    spec: ExpertSpec,
) -> Controller:
    """The policies that the settings name, around a pool of slots for experts like `spec`."""
    accelerated = kind != "none"
    decode = make_scheduler(settings.scheduler, costs, accelerated and devices.generate != "cpu")
    prefill = make_scheduler(settings.scheduler, costs, accelerated and devices.prefill != "cpu")
    prefetcher = make_prefetcher(settings.prefetch, decode) if accelerated else None
    return Controller(
        pool,
        costs,
        prefill,
        decode,
        make_cache(settings.cache, len(layers), spec.experts, spec.top_k, settings),
        prefetcher,
        spec.expert_bytes,
    )


def accelerator_kind(settings: Settings, devices: Devices) -> tuple[str, torch.device]:
    """Which accelerator the devices and the setting ask for together.

    `auto` takes CUDA where a device asks for it, or leaves the choice and there is one.
    """
    cpu = torch.device("cpu")
    if settings.accelerator in ("none", "emulated"):
        return settings.accelerator, cpu
    asked = devices.generate if devices.generate != "cpu" else devices.prefill
    if settings.accelerator == "auto":
        unusable = asked == "auto" and cuda_refusal() is not None
        if asked == "cpu" or unusable:
            return "none", cpu
    named = asked not in ("auto", "cpu", "cuda")
    return "cuda", torch.device(asked if named else "cuda:0")
