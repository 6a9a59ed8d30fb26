"""A small controller with the policies that a test names, and calls for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tiny_experts

from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.core import OFFLOADED, Routed
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller, Scored, Step, loads
from hybrimoe_plugin.policy.costs import CostModel
from hybrimoe_plugin.policy.link_time import LinkTime
from hybrimoe_plugin.policy.prefetch import make_prefetcher
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def make_controller(
    quota: int = 2,
    transfer_us: float = 300.0,
    accelerator_us: float = 50.0,
    costs: CostModel | None = None,
    **choices: str,
) -> Controller:
    settings = Settings.of(choices)
    if costs is None:
        costs = tiny_experts.costs(transfer_us=transfer_us, accelerator_us=accelerator_us)
    scheduler = make_scheduler(settings.scheduler, costs, True)
    return Controller(
        SlotPool([quota] * LAYERS, 4, settings.budget == "shared"),
        costs,
        scheduler,
        scheduler,
        make_cache(settings.cache, LAYERS, EXPERTS, TOP_K, settings),
        make_prefetcher(settings.prefetch, scheduler),
        100,
    )


def begin(made: Controller, layer: int, experts: Sequence[int], tokens: int, now_us: float) -> Step:
    """A call whose tokens all choose the same experts, with equal weights."""
    ids = np.tile(np.array(experts, dtype=np.int64), (tokens, 1))
    weights = np.full(ids.shape, 1.0 / len(experts), np.float32)
    return made.begin(layer, loads(ids), tokens, now_us, Scored(ids, weights, None))


def routed(*experts: int, ready_us: float = OFFLOADED) -> list[Routed]:
    """Experts of one token."""
    return [Routed(expert, 1, ready_us) for expert in experts]


def nobody_wants(link: LinkTime) -> None:
    """As if calls had made no demand loads for a long time."""
    link.demand_share[:] = 0.0, 0.0


def token(rng: np.random.Generator, tokens: int = 1) -> Scored:
    """Routing of some tokens; the first experts are chosen most often."""
    logits = rng.normal(size=(tokens, EXPERTS)) - np.arange(EXPERTS)
    scores = np.exp(logits).astype(np.float32)
    scores /= scores.sum(axis=1, keepdims=True)
    ids = np.argsort(-scores, axis=1)[:, :TOP_K]
    return Scored(ids, np.take_along_axis(scores, ids, axis=1), scores)


def books(made: Controller) -> tuple[object, ...]:
    """All that later decisions depend on."""
    counters = made.counters.snapshot()
    counters.plan_us = 0.0
    pool = made.pool
    return (
        [list(cached.items()) for cached in pool.cached],
        pool._free,
        pool._in_flight,
        pool._leased,
        made.residency.worth.tolist(),
        made.residency._arrivals,
        made.cache.ranks.tolist(),
        made.link.free_us,
        made.link.layer_us,
        made.link.demand_share,
        made.prefetch_record.by_distance,
        counters,
    )
