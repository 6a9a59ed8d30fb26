"""The systems that are compared: each a configuration of the engine's own policies, none a fork."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.prefetch import make_prefetcher
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.replay.oracle import BeladyCache
from hybrimoe_plugin.replay.sources import Popularity, with_predictions
from hybrimoe_plugin.replay.trace import Trace

STAGING = 4


@dataclass(frozen=True)
class System:
    """One way to run a model whose experts do not fit."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Engine settings; what is not named has its default."""
    look_ahead: int = 3
    split: bool = False
    """Whole layers on the accelerator instead of a share of every layer."""
    oracle: bool = False
    """Belady's cache and true predictions in place of the policies."""
    deferred: bool = True
    """Whether calls are learned from behind their launches."""


def _system(
    name: str, scheduler: str, cache: str, budget: str, prefetch: str, **more: Any
) -> System:
    settings = {"scheduler": scheduler, "cache": cache, "budget": budget, "prefetch": prefetch}
    return System(name, settings, **more)


OURS = System("ours")
LEARNING_FIRST = System("ours, learning before the launches", deferred=False)
KTRANSFORMERS = _system("kTransformers-like static", "static", "static", "layer", "off")
PUBLISHED = _system("HybriMoE as published", "greedy", "mrs", "layer", "impact")
BASELINES = (
    _system("llama.cpp-like layer split", "static", "static", "layer", "off", split=True),
    KTRANSFORMERS,
    _system("AdapMoE-like", "accelerator_only", "lru", "layer", "score", look_ahead=1),
    _system("FreeToken-like", "ratio", "lru", "shared", "off"),
    PUBLISHED,
)
ORACLE = System("oracle", oracle=True)
ABLATION = (
    KTRANSFORMERS,
    _system("+ greedy schedule", "greedy", "static", "layer", "off"),
    _system("+ near-exact schedule", "hybrimoe", "static", "layer", "off"),
    _system("+ MRS cache", "hybrimoe", "mrs", "layer", "off"),
    _system("+ learned ranks instead of MRS", "hybrimoe", "adaptive", "layer", "off"),
    _system("+ slots shared between layers", "hybrimoe", "adaptive", "shared", "off"),
    _system("+ prefetch by impact", "hybrimoe", "adaptive", "shared", "impact"),
    OURS,
)
SINGLE = (
    _system("static, MRS cache alone", "static", "mrs", "layer", "off"),
    _system("static, learned cache alone", "static", "adaptive", "shared", "off"),
)


def quotas(ratio: float, layers: int, experts: int, split: bool) -> list[int]:
    """Cached experts per layer; the sum is the same for every system."""
    each = round(ratio * experts)
    if not split:
        return [each] * layers
    total = each * layers
    return [max(0, min(experts, total - layer * experts)) for layer in range(layers)]


def build(
    system: System, trace: Trace, costs: CostModel, ratio: float, popularity: Popularity | None
) -> Controller:
    """The controller that the engine would have with these settings.

    Args:
        popularity: [L, E] shares of other text, by which every system's first experts are placed.
    """
    header = trace.header
    settings = Settings.of(system.settings)
    scheduler = make_scheduler(settings.scheduler, costs, True)
    if system.oracle:
        cache: Any = BeladyCache(trace)
    else:
        cache = make_cache(
            settings.cache, header.layers, header.experts, header.top_k, settings, popularity
        )
    return Controller(
        SlotPool(
            quotas(ratio, header.layers, header.experts, system.split),
            STAGING,
            settings.budget == "shared",
        ),
        costs,
        scheduler,
        scheduler,
        cache,
        make_prefetcher(settings.prefetch, scheduler),
        header.expert_bytes,
        system.deferred,
    )


def prepare(system: System, trace: Trace, recall: float, draw: int = 0) -> Trace:
    """The trace with the predictions that this system would see.

    They are recorded ones where there are any, else modelled.

    Args:
        draw: which of the modelled predictions' errors are drawn.
    """
    if Settings.of(system.settings).prefetch == "off":
        return trace
    if system.oracle:
        return with_predictions(trace, 1.0, system.look_ahead)
    if trace.header.predictions == "recorded":
        return Trace(
            trace.header,
            [call._replace(predicted=call.predicted[: system.look_ahead]) for call in trace.calls],
        )
    return with_predictions(trace, recall, system.look_ahead, draw)


def prompt_of(trace: Trace) -> Trace:
    """The calls of many tokens."""
    return Trace(
        trace.header, [call for group in trace.passes() if len(group[0].ids) > 1 for call in group]
    )
