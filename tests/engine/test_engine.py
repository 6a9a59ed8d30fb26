"""The engine computes what the plain experts compute, whoever computes what."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import tiny_experts
import torch

from hybrimoe_plugin.config import CACHES, PREFETCHERS, Settings
from hybrimoe_plugin.engine import CallRecord, Engine, SimulatedClock
from hybrimoe_plugin.experts.cpu_torch import TorchExperts
from hybrimoe_plugin.experts.memory import STAGING_SLOTS, cache_quotas
from hybrimoe_plugin.experts.slot_accelerator import make_accelerator
from hybrimoe_plugin.experts.weights import LayerWeights
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller
from hybrimoe_plugin.policy.prefetch import make_prefetcher
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.timeline import Timeline

LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 8, 2, 64
WEIGHTS = [tiny_experts.layer(index=index) for index in range(LAYERS)]


class FakeRouter:
    """Scores and predictions from a fixed random gate."""

    def __init__(self, seed: int) -> None:
        self.gate = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed))
        self._scores: torch.Tensor | None = None

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._scores = (hidden @ self.gate.T).softmax(-1)
        weights, ids = self._scores.topk(TOP_K)
        return ids, weights

    def scores(self) -> torch.Tensor | None:
        return self._scores

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ self.gate.T).topk(TOP_K).indices


def build(accelerator: str = "emulated", **choices: object) -> tuple[Engine, list[FakeRouter]]:
    settings = Settings.of(choices)
    costs = tiny_experts.costs()
    device = make_accelerator(accelerator, torch.device("cpu"))
    quotas = cache_quotas(settings, EXPERTS, [weights.spec.expert_bytes for weights in WEIGHTS], None)
    scheduler = make_scheduler(settings.scheduler, costs, device is not None)
    controller = Controller(
        SlotPool(quotas, STAGING_SLOTS, shared=settings.budget == "shared"),
        costs,
        scheduler,
        scheduler,
        make_cache(settings.cache, LAYERS, EXPERTS, TOP_K, settings),
        make_prefetcher(settings.prefetch, scheduler, costs),
        WEIGHTS[0].spec.expert_bytes,
    )
    cpu = TorchExperts(keep=True)
    for weights in WEIGHTS:
        cpu.add_layer(weights)
    if device is not None:
        device.allocate(controller.pool.slots, WEIGHTS)
    routers = [FakeRouter(index) for index in range(LAYERS)]
    look_ahead = 0 if settings.prefetch == "off" else settings.look_ahead
    return Engine(WEIGHTS, routers, controller, cpu, device, SimulatedClock(), look_ahead), routers


def plain(weights: LayerWeights, hidden: torch.Tensor, ids: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert: slow and obviously right."""
    output = torch.zeros_like(hidden)
    for token, (chosen, shares) in enumerate(zip(ids.tolist(), routing.tolist(), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            gate, up, down = weights.dequantized(expert)
            output[token] += share * (down @ (torch.nn.functional.silu(gate @ hidden[token]) * (up @ hidden[token])))
    return output


def run(engine: Engine, routers: list[FakeRouter], tokens: int, seed: int) -> None:
    hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
    for layer in range(LAYERS):
        ids, routing = routers[layer].route(hidden)
        output = engine.run(layer, hidden, ids, routing)
        torch.testing.assert_close(output, plain(WEIGHTS[layer], hidden, ids, routing))
        engine.controller.pool.check_integrity()
        hidden = hidden + output


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("scheduler", ["hybrimoe", "static", "accelerator_only", "cpu_only", "greedy"])
def test_every_combination_equals_the_plain_experts(scheduler: str, ratio: float) -> None:
    # Every cache and every prefetcher, each with some of the other kind: all pairs would take a minute.
    for cache, prefetch in zip(CACHES, itertools.cycle(PREFETCHERS), strict=False):
        engine, routers = build(scheduler=scheduler, cache=cache, prefetch=prefetch, cache_ratio=ratio)
        for seed, tokens in enumerate((1, 12, 1, 3)):
            run(engine, routers, tokens, seed)
        counts = engine.controller.counters
        assert counts.experts_cpu + counts.experts_accelerator == counts.activations > 0
        assert counts.prefetches >= counts.prefetches_used + counts.prefetches_wasted


def test_without_an_accelerator_the_cpu_computes_everything() -> None:
    engine, routers = build("none", cache_ratio=0.0)
    run(engine, routers, 5, 0)
    counts = engine.controller.counters
    assert counts.experts_cpu == counts.activations
    assert counts.transferred == 0


def test_no_weight_reaches_another_expert() -> None:
    """Upstream's fault: positions in sub-lists used as positions in the top-k list."""
    engine, _ = build(cache_ratio=0.5, scheduler="hybrimoe")
    hidden = torch.randn(1, HIDDEN)
    for first, second in itertools.permutations(range(EXPERTS), 2):
        ids, routing = torch.tensor([[first, second]]), torch.tensor([[0.9, 0.1]])
        right, swapped = plain(WEIGHTS[0], hidden, ids, routing), plain(WEIGHTS[0], hidden, ids.flip(1), routing)
        output = engine.run(0, hidden, ids, routing)
        torch.testing.assert_close(output, right)
        assert (output - swapped).norm() > 0.05 * right.norm(), "the test could not see a swapped weight"


def test_prefetched_experts_are_used() -> None:
    engine, routers = build(cache_ratio=0.5, scheduler="static", prefetch="impact")
    for seed in range(30):
        run(engine, routers, 1, seed)
    counts = engine.controller.counters
    assert counts.prefetches > 0
    assert counts.prefetches_used > 0


def test_an_interrupted_call_leaves_the_engine_usable() -> None:
    engine, routers = build(cache_ratio=0.25)
    hidden = torch.randn(4, HIDDEN)
    ids, routing = routers[0].route(hidden)

    def interrupt(_hidden: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    routers[1].predict = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.run(0, hidden, ids, routing)
    del routers[1].predict
    engine.controller.pool.check_integrity()
    run(engine, routers, 4, 1)


def test_recorder_sees_every_call() -> None:
    engine, routers = build(cache_ratio=0.25, look_ahead=2)
    calls: list[CallRecord] = []
    engine.recorder = calls.append
    run(engine, routers, 3, 0)
    assert [call.layer for call in calls] == [0, 1, 2]
    assert [len(call.predicted) for call in calls] == [2, 1, 0]
    assert calls[0].scores is not None
    assert calls[0].scores.shape == (3, EXPERTS)


def test_timeline_is_a_trace_with_one_slice_per_expert(tmp_path: Path) -> None:
    engine, routers = build(cache_ratio=0.25)
    with Timeline(tmp_path / "run.json") as timeline:
        engine.timeline = timeline
        for seed in range(5):
            run(engine, routers, 2, seed)
    counts = engine.controller.counters
    events = [event for event in json.loads((tmp_path / "run.json").read_text()) if event["ph"] == "X"]
    computed = [event for event in events if event["cat"] in ("cpu", "accelerator")]
    assert len(computed) == counts.activations
    assert len(events) - len(computed) == counts.transferred
    assert all(event["dur"] >= 0 for event in events)
