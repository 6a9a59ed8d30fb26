"""Choose the backend that computes experts on the CPU, and share cores between several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from hybrimoe_plugin.compute.backends import CPUBackend
from hybrimoe_plugin.compute.cpu.ggml import TYPES, Ggml
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.cpu.kt_experts import KTExperts, refusal
from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel
from hybrimoe_plugin.compute.cpu.shared_experts import SharedCPU
from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.compute.gpu.accelerator import SlotAccelerator
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.device.machine import hardware
from hybrimoe_plugin.engine import Engine
from hybrimoe_plugin.engine.calibrate import ensure_profile, shared_threads
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.policy.profile import MachineProfile
from hybrimoe_plugin.replay.profile_files import load_profile
from hybrimoe_plugin.weights.layer_weights import LayerWeights

log = logging.getLogger(__name__)


def share_cores(engines: Sequence[Engine]) -> None:
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


def cpu_for(backend: str, threads: int, others: Sequence[Engine], alone: bool) -> CPUBackend:
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
