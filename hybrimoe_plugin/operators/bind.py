"""Connect a model's experts operators to one engine each device, sized and calibrated."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.engine import CallRecord, Engine, Router, SimulatedClock, WallClock
from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.experts.base import CPUBackend
from hybrimoe_plugin.experts.calibrate import ensure_profile, hardware, shared_threads
from hybrimoe_plugin.experts.cpu_ggml import GgmlExperts
from hybrimoe_plugin.experts.cpu_kt import KTExperts, import_kernel, refusal
from hybrimoe_plugin.experts.cpu_shared import SharedCPU
from hybrimoe_plugin.experts.cpu_torch import TorchExperts
from hybrimoe_plugin.experts.ggml import TYPES, Ggml
from hybrimoe_plugin.experts.memory import cache_quotas, kv_cache_bytes, staging_slots
from hybrimoe_plugin.experts.slot_accelerator import SlotAccelerator, cuda_refusal, make_accelerator
from hybrimoe_plugin.experts.weights import LayerWeights
from hybrimoe_plugin.operators.dense import DenseOperator, shared_kernels
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.routers import GateRouter
from hybrimoe_plugin.operators.turns import Turns
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.prefetch import make_prefetcher
from hybrimoe_plugin.policy.profile import MachineProfile
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.replay.profile_files import load_profile
from hybrimoe_plugin.timeline import Timeline

log = logging.getLogger(__name__)

CLOSED = (
    "this model was closed, its threads and memory are given back: load it again with load_model"
)


class HybriMoE:
    """What an injected model carries as `model.hybrimoe`: counters, timeline, recording, and the
    way back.

    Every method may be called while other threads compute: it waits until their running pass is
    over.

    Attributes:
        engines: one for each device that the rules name.
        profiles: the machine profile of each engine.
        turns: of the threads that use the model.
    """

    def __init__(self, engines: Sequence[Engine], profiles: Sequence[MachineProfile]) -> None:
        self.engines = tuple(engines)
        self.profiles = tuple(profiles)
        self.turns = Turns()
        self.on_restore: Callable[[], None] | None = None
        """Set by the host: puts the original modules back."""

    def __deepcopy__(self, _memo: object) -> HybriMoE:
        """Itself: it is no part of the model, and a restored model can be copied."""
        return self

    @property
    def emulated(self) -> bool:
        """Whether times in the counters come from an emulated accelerator."""
        return any(engine.clock.emulated for engine in self.engines)

    def stats(self) -> Counters:
        """A snapshot of the counters, summed over engines."""
        total = Counters()
        with self.turns.lock:
            for engine in self.engines:
                total = total.plus(engine.controller.counters)
        return total

    def reset_stats(self) -> None:
        with self.turns.lock:
            for engine in self.engines:
                engine.controller.counters.reset()

    def timeline(self, path: str | Path) -> Timeline:
        """Write every layer call from now on to a trace file, until the returned object is
        closed.
        """
        timeline = Timeline(path)
        with self.turns.lock:
            for engine in self.engines:
                engine.timeline = timeline
        timeline.closing.append(lambda: self._detach(timeline))
        return timeline

    def _detach(self, timeline: Timeline) -> None:
        with self.turns.lock:
            for engine in self.engines:
                if engine.timeline is timeline:
                    engine.timeline = None

    def record(self, recorder: Callable[[CallRecord], None] | None) -> None:
        """Hand every layer call's routing to `recorder`; None stops it."""
        with self.turns.lock:
            for engine in self.engines:
                engine.recorder = recorder

    def check_integrity(self) -> None:
        """Compare every cached expert on the accelerator with the file's bytes; slow. Raises:
        BackendError.
        """
        with self.turns.lock:
            for engine in self.engines:
                engine.check_integrity()

    def restore(self) -> None:
        """Put the original modules back and give back threads and device memory.

        They are as the injection found them: experts, and dense matrices that stayed as stored,
        never had weights of their own.
        """
        with self.turns.lock:
            if self.on_restore is not None:
                self.on_restore()
                self.on_restore = None
            self.close()

    def close(self) -> None:
        """Give back threads and device memory, once no thread computes; a forward pass after it
        raises BackendError.
        """
        with self.turns.lock:
            self.turns.end(CLOSED)
            for engine in self.engines:
                for router in engine.routers:
                    if isinstance(router, GateRouter):
                        router.detach()
                engine.close()


def bind(
    model: nn.Module,
    *,
    routers: Callable[[nn.Module, HybriMoEExperts], Router] | None = None,
    progress: bool = True,
    free_bytes: int | None = None,
) -> HybriMoE:
    """Build the engines for all experts operators of a model whose `load` has been called.

    Args:
        routers: gives the router beside an operator; by default the `gate` of the operator's
            parent.
        progress: show a bar while the machine is measured for the first time.
        free_bytes: accelerator memory for experts; default what is free now on its device.

    Raises:
        ConfigError, BudgetError, BackendError: settings that cannot be met, before anything is
            allocated.
    """
    operators = [module for module in model.modules() if isinstance(module, HybriMoEExperts)]
    if not operators:
        raise ConfigError("no HybriMoEExperts in this model: the rules injected none")
    groups: dict[tuple[str, str, Settings], list[HybriMoEExperts]] = {}
    for operator in operators:
        key = (operator.prefill_device, operator.generate_device, operator.settings)
        groups.setdefault(key, []).append(operator)
    engines: list[Engine] = []
    profiles: list[MachineProfile] = []
    for (prefill, generate, settings), members in groups.items():
        found = [(routers or _gate_beside)(model, operator) for operator in members]
        share = len(members) / len(operators)
        latent = any(
            isinstance(module, DenseOperator) and module.keeps_latents for module in model.modules()
        )
        kept_bytes = int(
            share * kv_cache_bytes(getattr(model, "config", None), settings.context, latent)
        )
        engine, profile = _build(
            members, found, settings, prefill, generate, progress, free_bytes, kept_bytes, engines
        )
        engines.append(engine)
        profiles.append(profile)
    _share_cores(engines)
    handle = HybriMoE(engines, profiles)
    handle.turns.recover += [operator.recover for operator in operators]
    # Threads and pinned memory must go with the model, also when nobody calls close.
    weakref.finalize(model, _close_all, engines, handle.turns)
    if any(parameter.is_cuda for parameter in model.parameters()) or _any_cuda(engines):
        leave_cudnn_attention()
    return handle


def leave_cudnn_attention() -> None:
    """Keep torch's attention away from cuDNN, for the whole process.

    cuDNN makes a plan for every new number of keys, which decode has at every token, and a plan
    takes a good part of a second. From 2.11 on torch asks it first on Hopper. torch's own kernels
    take any length as it comes.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _any_cuda(engines: Sequence[Engine]) -> bool:
    return any(
        engine.accelerator is not None and engine.accelerator.device.type == "cuda"
        for engine in engines
    )


def _share_cores(engines: Sequence[Engine]) -> None:
    """Leave torch the cores that workers do not take: both spin, and fight to a standstill
    otherwise.
    """
    pools = {id(pool): pool for pool in map(_pool, engines)}
    workers = sum(pool.workers for pool in pools.values())
    threads = max(1, int(hardware()["cores"]) - workers)
    if workers and threads < torch.get_num_threads():
        log.info("torch now uses %d threads beside %d CPU expert workers", threads, workers)
        torch.set_num_threads(threads)


def _pool(engine: Engine) -> CPUBackend:
    return engine.cpu.backend if isinstance(engine.cpu, SharedCPU) else engine.cpu


def _cpu_for(backend: str, threads: int, others: Sequence[Engine], alone: bool) -> CPUBackend:
    """A backend of the engine's own, or its part of the one that the model's other engines have
    made.
    """
    for engine in others:
        pool = _pool(engine)
        fits = pool.name == backend and getattr(pool, "threads", threads) == threads
        if fits and (backend != "ggml" or (pool.workers == 0) == alone):
            return SharedCPU(
                pool, sum(len(other.layers) for other in others if _pool(other) is pool)
            )
    return make_cpu(backend, threads, alone)


def _close_all(engines: Sequence[Engine], turns: Turns) -> None:
    with turns.lock:  # at the interpreter's exit a daemon thread may still be computing
        turns.end(CLOSED)
        for engine in engines:
            engine.close()


def _build(
    operators: Sequence[HybriMoEExperts],
    routers: Sequence[Router],
    settings: Settings,
    prefill: str,
    generate: str,
    progress: bool,
    free_bytes: int | None,
    kept_bytes: int,
    others: Sequence[Engine],
) -> tuple[Engine, MachineProfile]:
    layers = [_loaded(operator) for operator in operators]
    spec = layers[0].spec
    kind, device = accelerator_kind(settings, prefill, generate)
    accelerator = make_accelerator(kind, device, settings.kernels)
    quotas = [0] * len(layers)
    if accelerator is not None:
        if kind == "cuda" and free_bytes is None:
            # The dense weights are there already; attention's cache is not, and grows until the
            # context is full.
            free_bytes = max(0, torch.cuda.mem_get_info(device)[0] - kept_bytes)
        quotas = cache_quotas(
            settings, spec.experts, [w.spec.expert_bytes for w in layers], free_bytes
        )
    alone = accelerator is None
    backend, profile = choose_cpu(settings, layers, accelerator, progress=progress)
    costs = profile.costs(spec)
    decode = make_scheduler(settings.scheduler, costs, kind != "none" and generate != "cpu")
    prefiller = make_scheduler(settings.scheduler, costs, kind != "none" and prefill != "cpu")
    controller = Controller(
        SlotPool(quotas, staging_slots(sum(quotas)), shared=settings.budget == "shared"),
        costs,
        prefiller,
        decode,
        make_cache(settings.cache, len(layers), spec.experts, spec.top_k, settings),
        None if accelerator is None else make_prefetcher(settings.prefetch, decode, costs),
        spec.expert_bytes,
    )
    cpu = _cpu_for(backend, settings.cpu_threads or profile.cpu.threads or 1, others, alone)
    if isinstance(cpu, GgmlExperts):
        cpu.share(shared_kernels(operators[0].store))
        cpu.repack &= settings.weights != "mapped"
    for weights in layers:
        cpu.add_layer(weights)
    if accelerator is not None:
        accelerator.allocate(controller.pool.slots, layers)
    clock = SimulatedClock() if kind == "emulated" else WallClock()
    look_ahead = 0 if settings.prefetch == "off" else settings.look_ahead
    verify = settings.verify == "slots"
    engine = Engine(layers, routers, controller, cpu, accelerator, clock, look_ahead, verify)
    for position, operator in enumerate(operators):
        operator.bind(engine, position)
    return engine, profile


def _loaded(operator: HybriMoEExperts) -> LayerWeights:
    if operator.weights is None:
        raise BackendError(f"{operator.key}: load() has not been called")
    return operator.weights


def accelerator_kind(settings: Settings, prefill: str, generate: str) -> tuple[str, torch.device]:
    """Which accelerator the devices and the setting ask for together.

    `auto` takes CUDA where a device asks for it, or leaves the choice and there is one.
    """
    asked = generate if generate != "cpu" else prefill
    if settings.accelerator in ("none", "emulated"):
        return settings.accelerator, torch.device("cpu")
    if settings.accelerator == "auto" and (
        asked == "cpu" or (asked == "auto" and cuda_refusal() is not None)
    ):
        return "none", torch.device("cpu")
    return "cuda", torch.device("cuda:0" if asked in ("auto", "cpu", "cuda") else asked)


def cpu_backends(
    settings: Settings, layers: Sequence[LayerWeights], alone: bool
) -> tuple[str, ...]:
    """What can run these layers: the one asked for; by `auto` all there are, the torch reference if
    all else fails.

    Args:
        alone: there is no accelerator, so nothing is gained by workers beside the caller:
            kt-kernel's ggml graphs.
    """
    if settings.cpu_backend != "auto":
        return (settings.cpu_backend,)
    ggml = _works(Ggml) and all(
        matrix.type_name in TYPES for weights in layers for matrix in weights.matrices()
    )
    if alone and ggml:
        return ("ggml",)
    workers = not any(refusal(weights.spec) for weights in layers) and _works(import_kernel)
    return (*(["kt"] if workers else []), *(["ggml"] if ggml else [])) or ("torch",)


def _works(load: Callable[[], object]) -> bool:
    try:
        load()
    except BackendError as error:
        log.info("%s", error)
        return False
    return True


def make_cpu(backend: str, threads: int, alone: bool = True) -> CPUBackend:
    """Args: alone: nothing else computes meanwhile."""
    if backend == "ggml":
        return GgmlExperts(threads, beside=not alone)
    return KTExperts(threads) if backend == "kt" else TorchExperts(keep=False)


def choose_cpu(
    settings: Settings,
    layers: Sequence[LayerWeights],
    accelerator: SlotAccelerator | None,
    *,
    progress: bool = True,
    refresh: bool = False,
) -> tuple[str, MachineProfile]:
    """(CPU backend, machine profile with it): of several backends the one that is measured to be
    quickest in decode.

    Args:
        refresh: measure again what has been measured before.
    """
    alone = accelerator is None
    backends = cpu_backends(settings, layers, alone)
    if settings.profile is not None:
        return backends[0], load_profile(settings.profile)
    profiles = {
        backend: ensure_profile(
            layers[0],
            backend,
            lambda threads, backend=backend: make_cpu(backend, threads, alone),  # type: ignore[misc]
            accelerator,
            threads=cpu_threads(settings, backend, alone),
            progress=progress,
            refresh=refresh,
        )
        for backend in backends
    }
    best = min(
        backends,
        key=lambda backend: (
            profiles[backend].cpu.first_us + layers[0].spec.top_k * profiles[backend].cpu.us[0]
        ),
    )
    if len(backends) > 1:
        log.info("CPU experts by %s, the quickest of %s", best, ", ".join(backends))
    return best, profiles[best]


def cpu_threads(settings: Settings, backend: str, alone: bool) -> int | None:
    """Threads that are settled before anything is measured."""
    return settings.cpu_threads or (shared_threads() if backend == "ggml" and alone else None)


def _gate_beside(model: nn.Module, operator: HybriMoEExperts) -> Router:
    """The `gate` of the MoE block that holds the operator, as in transformers 5.x."""
    parent = model.get_submodule(operator.key.rpartition(".")[0])
    gate = getattr(parent, "gate", None)
    if not isinstance(gate, nn.Module):
        raise BackendError(f"{operator.key}: no router named `gate` beside it")
    return GateRouter(gate)
