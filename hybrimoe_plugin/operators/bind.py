"""Connect a model's experts operators to engines, one for each device that rules name."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.engine import CallRecord, Engine, Router
from hybrimoe_plugin.engine.assemble import build_engine
from hybrimoe_plugin.engine.cpu_choice import pool_of, share_cores
from hybrimoe_plugin.engine.sizing import kv_cache_bytes
from hybrimoe_plugin.engine.timeline import Timeline
from hybrimoe_plugin.engine.turns import Turns
from hybrimoe_plugin.engine.view import own_rows, truth_values
from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.operators.dense import DenseOperator, shared_kernels
from hybrimoe_plugin.operators.experts import HybriMoEExperts
from hybrimoe_plugin.operators.routers import NAMES, GateRouter, router_beside
from hybrimoe_plugin.policy.counters import Counters
from hybrimoe_plugin.policy.profile import MachineProfile
from hybrimoe_plugin.policy.step import Rows
from hybrimoe_plugin.weights.layer_weights import LayerWeights

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOSED = (
    "this model was closed, its threads and memory are given back: load it again with load_model"
)


class HybriMoE:
    """What an injected model has as `model.hybrimoe`: counters, timeline, recording, `restore`.

    Every method may be called while other threads compute: it waits until their running pass is
    over.

    Attributes:
        model: name of the model's class.
        engines: one for each device that the rules name.
        profiles: the machine profile of each engine.
        settings: of each engine.
        turns: lets the threads that use the model take turns.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        profiles: Sequence[MachineProfile],
        settings: Sequence[Settings],
        model: str,
    ) -> None:
        self.model = model
        self.settings = tuple(settings)
        self.engines = tuple(engines)
        self.profiles = tuple(profiles)
        self.turns = Turns()
        self._ended = ""
        self.on_restore: Callable[[], None] | None = None
        """Set by the host: puts the original modules back."""

    def __deepcopy__(self, _memo: object) -> HybriMoE:
        """Itself: it is not a part of the model, so that a restored model can be copied."""
        return self

    def __repr__(self) -> str:
        counters = self.stats()
        lines = [f"HybriMoE of {self.model}{self._ended}"]
        for engine, settings in zip(self.engines, self.settings, strict=True):
            lines.append(f"  {_described(engine, settings)}")
        if counters.activations:
            label = "emulated" if self.emulated else "measured"
            parts = [f"{counters.calls} layer calls"]
            if any(engine.accelerator is not None for engine in self.engines):
                parts.append(f"{counters.hit_rate:.1%} of the experts were cached")
            parts.append(f"{counters.moe_us / 1e6:.2f} s in experts ({label})")
            lines.append(f"  so far: {', '.join(parts)}")
        else:
            lines.append("  so far: not called")
        return "\n".join(lines)

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
        """Begin to count anew."""
        with self.turns.lock:
            for engine in self.engines:
                engine.controller.counters.reset()

    def timeline(self, path: str | Path) -> Timeline:
        """Write every layer call to a trace file until the returned object is closed."""
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

    def run_rows(self, rows: Rows, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Make one forward pass that several conversations share, or that verifies a draft's tree.

        Policies treat each of its layer calls as one step, not as a prompt; calls of more than 32
        rows are prompts all the same. Returns what `call` returns.

        Args:
            rows: one entry for each token of the pass, in the order of its flattened ids.
            call: makes the pass with the other arguments, usually the model itself.

        Raises:
            InputError: no `Rows`, or an experts layer is called with another number of them.
        """
        return self.turns.run(self._with_rows, own_rows(rows), call, args, kwargs)

    def _with_rows(self, rows: Rows, call: Callable[..., T], args: Any, kwargs: Any) -> T:
        before = self.engines[0].rows  # a pass may be made within another
        try:
            for engine in self.engines:
                engine.rows = rows
            return call(*args, **kwargs)
        except BaseException:
            for engine in self.engines:
                engine.controller.cache.forget_draft()  # a part of it was not learned
            raise
        finally:
            for engine in self.engines:
                engine.rows = before

    def verified(self, accepted: Sequence[bool] | NDArray[np.bool_]) -> None:
        """Say which rows [T] of the last `run_rows` belong to the text; the others were rejected.

        Nothing happens if all rows were sure, or if this was said before. After an interrupt it may
        be said again; only the cache's ranks depend on it.

        Raises:
            InputError: the pass had another number of rows, or these are no truth values.
        """
        known = truth_values("verified", accepted)
        with self.turns.lock:
            for engine in self.engines:
                engine.verified(known)

    def check_integrity(self) -> None:
        """Compare cached experts with the file; slow. Raises: BackendError: they differ."""
        with self.turns.lock:
            for engine in self.engines:
                engine.check_integrity()

    def restore(self) -> None:
        """Put the original modules back and give back threads and device memory.

        The modules are as the injection found them: experts, and dense matrices that stayed
        quantised, never had weights of their own.
        """
        with self.turns.lock:
            if self.on_restore is not None:
                self.on_restore()
                self.on_restore = None
                self._ended = ", restored"
            self.close()

    def close(self) -> None:
        """Give back threads and device memory, once no thread computes.

        A forward pass after it raises BackendError.
        """
        with self.turns.lock:
            self.turns.end(CLOSED)
            self._ended = self._ended or ", closed"
            for engine in self.engines:
                for router in engine.routers:
                    if isinstance(router, GateRouter):
                        router.detach()
                engine.close()


def _described(engine: Engine, settings: Settings) -> str:
    """An engine in one line: layers, devices, cache and policies."""
    spec = engine.layers[0].spec
    pool = pool_of(engine)
    threads = getattr(pool, "threads", None)
    team = "" if threads is None else f" with {threads} thread{'' if threads == 1 else 's'}"
    parts = [
        f"{len(engine.layers)} layers of {spec.experts} experts, {spec.top_k} for each token",
        f"CPU: {pool.name}{team}",
    ]
    if engine.accelerator is None:
        return "; ".join([*parts, "no accelerator"])
    cached = sum(engine.controller.pool.quotas)
    name = engine.accelerator.name
    device = name if engine.clock.emulated else str(engine.accelerator.device)
    parts += [
        f"accelerator: {device}, {cached} of {spec.experts * len(engine.layers)} experts cached",
        f"scheduler {settings.scheduler}, cache {settings.cache}, prefetch {settings.prefetch}",
    ]
    return "; ".join(parts)


def bind(
    model: nn.Module,
    *,
    routers: Callable[[nn.Module, HybriMoEExperts], Router] | None = None,
    progress: bool = True,
    free_bytes: int | None = None,
) -> HybriMoE:
    """Build the engines for all experts operators of a model whose `load` has been called.

    Args:
        routers: returns the router of an operator; by default its parent's `gate`.
        progress: show a bar while the machine is measured for the first time.
        free_bytes: accelerator memory for experts; default what is free now on its device.

    Raises:
        ConfigError, BudgetError, BackendError: settings that cannot be met, before anything is
            allocated.
    """
    operators = [module for module in model.modules() if isinstance(module, HybriMoEExperts)]
    if not operators:
        raise ConfigError("no HybriMoEExperts in this model: the rules injected none")
    engines: list[Engine] = []
    profiles: list[MachineProfile] = []
    chosen: list[Settings] = []
    for members in by_engine(operators):
        first = members[0]
        store = first.store
        engine, profile = build_engine(
            [_loaded(operator) for operator in members],
            [(routers or _gate_beside)(model, operator) for operator in members],
            first.settings,
            first.devices,
            others=engines,
            kernels=functools.partial(shared_kernels, store, first.settings),
            free_bytes=free_bytes,
            kept_bytes=attention_bytes(
                model, first.settings.context, len(members) / len(operators)
            ),
            progress=progress,
        )
        for position, operator in enumerate(members):
            operator.bind(engine, position)
        engines.append(engine)
        profiles.append(profile)
        chosen.append(first.settings)
    share_cores(engines)
    handle = HybriMoE(engines, profiles, chosen, type(model).__name__)
    handle.turns.clean_up += [operator.recover for operator in operators]
    # Threads and pinned memory must go with the model, also when nobody calls close.
    weakref.finalize(model, _close_all, engines, handle.turns)
    if any(parameter.is_cuda for parameter in model.parameters()) or _any_cuda(engines):
        leave_cudnn_attention()
    return handle


def by_engine(operators: Sequence[HybriMoEExperts]) -> list[list[HybriMoEExperts]]:
    """Operators that share an engine: those with the same devices and settings."""
    groups: dict[tuple[str, str, Settings], list[HybriMoEExperts]] = {}
    for operator in operators:
        key = operator.prefill_device, operator.generate_device, operator.settings
        groups.setdefault(key, []).append(operator)
    return list(groups.values())


def attention_bytes(model: nn.Module, context: int, share: float) -> int:
    """What the KV cache of a context needs on a device, which has this share of the layers.

    The context is the model's own where that is shorter.
    """
    keeps_latents = any(
        isinstance(module, DenseOperator) and module.keeps_latents for module in model.modules()
    )
    config = getattr(model, "config", None)
    dtype: torch.dtype = getattr(model, "dtype", torch.bfloat16)
    context = shorter_context(model, context)
    return int(share * kv_cache_bytes(config, context, keeps_latents, dtype.itemsize))


def shorter_context(model: nn.Module, context: int) -> int:
    """This context in tokens, or the model's own where that is shorter."""
    own = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(context, own) if isinstance(own, int) else context


def leave_cudnn_attention() -> None:
    """Do not let torch use cuDNN's attention, in the whole process.

    cuDNN plans anew for every number of keys, which grows with each token in decode, and a plan
    takes a good part of a second. From 2.11 on torch prefers it on Hopper. torch's own kernels need
    no plan.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _any_cuda(engines: Sequence[Engine]) -> bool:
    devices = [engine.accelerator.device for engine in engines if engine.accelerator is not None]
    return any(device.type == "cuda" for device in devices)


def _close_all(engines: Sequence[Engine], turns: Turns) -> None:
    with turns.lock:  # at the interpreter's exit a daemon thread may still be computing
        turns.end(CLOSED)
        for engine in engines:
            engine.close()


def _loaded(operator: HybriMoEExperts) -> LayerWeights:
    if operator.weights is None:
        raise BackendError(f"{operator.key}: load() has not been called")
    return operator.weights


def _gate_beside(model: nn.Module, operator: HybriMoEExperts) -> Router:
    """The router of the block that holds the operator, as in transformers 5.x."""
    parent = model.get_submodule(operator.key.rpartition(".")[0])
    gate = router_beside(parent)
    if gate is None:
        raise BackendError(f"{operator.key}: no router named {' or '.join(NAMES)} beside it")
    return GateRouter(gate, _loaded(operator).spec.experts)
