"""Choose the backend that computes experts on the CPU, and share cores between several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from hybrimoe_plugin.compute.backends import CPUBackend
from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.compute.cpu.ggml_experts import GgmlExperts
from hybrimoe_plugin.compute.cpu.ggml_stored import is_apart
from hybrimoe_plugin.compute.cpu.kt_experts import KTExperts, refusal
from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel
from hybrimoe_plugin.compute.cpu.native.kernels import compiled
from hybrimoe_plugin.compute.cpu.requantise import (
    Requantised,
    by_type,
    readable_types,
    replaced,
)
from hybrimoe_plugin.compute.cpu.shared_experts import SharedCPU
from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.device.machine import hardware
from hybrimoe_plugin.device.memory import check_host
from hybrimoe_plugin.engine.engine import Engine
from hybrimoe_plugin.engine.profile_store import ensure_profile
from hybrimoe_plugin.engine.threads import shared_threads
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.policy.profile import MachineProfile
from hybrimoe_plugin.replay.profile_files import load_profile
from hybrimoe_plugin.weights.layer_weights import LayerWeights

log = logging.getLogger(__name__)

ON_GGML = frozenset({"ggml", "operations"})
"""Backends on ggml's arithmetic, which read in place what is stored: its own graphs, and the
compiled operations, which `auto` takes in place of these.
"""


def share_cores(engines: Sequence[Engine]) -> None:
    """Leave torch the cores that workers do not take.

    Both spin while they wait: on the same cores they would keep each other from running.

    Mutates: torch's number of threads.
    """
    pools = {id(pool): pool for pool in map(pool_of, engines)}
    workers = sum(pool.workers for pool in pools.values())
    threads = max(1, int(hardware()["cores"]) - workers)
    if workers and threads < torch.get_num_threads():
        log.info("torch now uses %d threads beside %d CPU expert workers", threads, workers)
        torch.set_num_threads(threads)


def pool_of(engine: Engine) -> CPUBackend:
    """The backend whose threads compute for an engine."""
    if isinstance(engine.cpu, SharedCPU):
        return engine.cpu.backend
    return engine.cpu


def cpu_for(backend: str, threads: int, others: Sequence[Engine], alone: bool) -> CPUBackend:
    """A new backend, or a part of the one that the model's other engines have made.

    Args:
        others: the model's engines so far.
        alone: whether nothing else computes meanwhile.
    """
    for engine in others:
        pool = pool_of(engine)
        if pool.name != backend or getattr(pool, "threads", threads) != threads:
            continue
        if backend in ON_GGML and (pool.workers == 0) != alone:
            continue
        first = sum(len(other.layers) for other in others if pool_of(other) is pool)
        return SharedCPU(pool, first)
    return make_cpu(backend, threads, alone)


def cpu_backends(
    settings: Settings, layers: Sequence[LayerWeights], alone: bool
) -> tuple[str, ...]:
    """Names of the backends that can run these layers.

    The one that the setting names; for `auto` those that read every matrix as stored, else those
    that requantise some, or the torch reference if there is no other.

    Args:
        alone: there is no accelerator, so workers beside the caller gain nothing: what computes on
            the caller's threads is taken.
    """
    if settings.cpu_backend != "auto":
        return (settings.cpu_backend,)
    ggml = _works(Ggml)
    # kt-kernel would copy experts that do not lie one after another: the whole model twice.
    apart = any(is_apart(matrix) for weights in layers for matrix in weights.matrices())
    if ggml and (alone or apart):
        return (_on_ggml(),)
    found = []
    refused = any(refusal(weights.spec) for weights in layers)
    if not refused and _works(import_kernel):
        found.append("kt")
    if ggml:
        found.append(_on_ggml())
    # Speed is no reason to keep experts in memory a second time, in larger types.
    as_stored = [backend for backend in found if not requantised_experts(backend, layers)]
    return tuple(as_stored or found) or ("torch",)


def _on_ggml() -> str:
    """The fastest backend on ggml's arithmetic."""
    return "operations" if compiled() else "ggml"


def requantised_experts(backend: str, layers: Sequence[LayerWeights]) -> list[Requantised]:
    """What a backend makes of matrices in types that it has no kernel for."""
    if backend == "torch":
        return []
    types = readable_types(backend)
    return [made for weights in layers for made in replaced(weights, types)]


def check_copies(settings: Settings, layers: Sequence[LayerWeights], alone: bool) -> None:
    """Say which experts will be requantised, where nothing was predicted before.

    Args:
        alone: as in `cpu_backends`.

    Raises:
        BudgetError: the copies do not fit into memory.
    """
    backend = cpu_backends(settings, layers, alone)[0]
    found = by_type(requantised_experts(backend, layers))
    if found:
        text = "; ".join(item.text() for item in found)
        log.warning("%s", text)
        check_host(sum(item.nbytes for item in found), f"{text}: these copies")


def _slow_notice(layers: Sequence[LayerWeights]) -> str:
    """What it costs that only the torch reference can run these layers, and the way out."""
    reasons = [_failure(import_kernel), *(refusal(weights.spec) for weights in layers)]
    reason = next(filter(None, reasons), None) or _failure(Ggml)
    return f"experts on the CPU run on the torch reference, some 13 times slower: {reason}"


def _failure(load: Callable[[], object]) -> str | None:
    try:
        load()
    except BackendError as error:
        return str(error)
    return None


def _works(load: Callable[[], object]) -> bool:
    failure = _failure(load)
    if failure is not None:
        log.info("%s", failure)
    return failure is None


def make_cpu(backend: str, threads: int, alone: bool = True) -> CPUBackend:
    """A backend by name.

    Args:
        alone: whether nothing else computes meanwhile.

    Raises:
        BackendError: it cannot be used.
    """
    if backend in ON_GGML:
        return GgmlExperts(threads, beside=not alone, operations=backend == "operations")
    if backend == "kt":
        return KTExperts(threads)
    return TorchExperts(keep=False)


def choose_cpu(
    settings: Settings,
    layers: Sequence[LayerWeights],
    accelerator: SlotAccelerator | None,
    *,
    progress: bool = True,
    refresh: bool = False,
    first: bool = True,
) -> tuple[str, MachineProfile]:
    """(CPU backend, machine profile with it).

    Of several backends it is the one that is measured to be fastest in decode.

    Args:
        refresh: measure again what has been measured before.
        first: the model has no other engine yet; only the first one says that there are no fast
            kernels.
    """
    alone = accelerator is None
    backends = cpu_backends(settings, layers, alone)
    if first and settings.cpu_backend == "auto" and "torch" in backends:
        log.warning("%s", _slow_notice(layers))
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
    top_k = layers[0].spec.top_k

    def token_us(backend: str) -> float:
        cpu = profiles[backend].cpu
        return cpu.first_us + top_k * cpu.us[0]

    best = min(backends, key=token_us)
    if len(backends) > 1:
        log.info("CPU experts by %s, the fastest of %s", best, ", ".join(backends))
    return best, profiles[best]


def cpu_threads(settings: Settings, backend: str, alone: bool) -> int | None:
    """Number of threads where it is decided before anything is measured, else None."""
    if settings.cpu_threads:
        return settings.cpu_threads
    if backend in ON_GGML and alone:
        return shared_threads()
    return None
