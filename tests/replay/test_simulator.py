"""Replay drives the engine's own controller: on the same trace it predicts the engine's clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_experts
import torch

from hybrimoe_plugin.compute.cpu.torch_experts import TorchExperts
from hybrimoe_plugin.compute.gpu.accelerator import make_accelerator
from hybrimoe_plugin.config import Settings
from hybrimoe_plugin.engine import CallRecord, Engine, SimulatedClock
from hybrimoe_plugin.policy.cache import make_cache
from hybrimoe_plugin.policy.controller import Controller
from hybrimoe_plugin.policy.prefetch import make_prefetcher
from hybrimoe_plugin.policy.schedule import make_scheduler
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.policy.step import Scored
from hybrimoe_plugin.replay.oracle import BeladyCache
from hybrimoe_plugin.replay.simulator import replay
from hybrimoe_plugin.replay.sources import synthetic, with_predictions
from hybrimoe_plugin.replay.trace import Call, Trace, TraceHeader, TraceWriter, read_trace

LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 8, 2, 64
COSTS = tiny_experts.costs()


class GateRouter:
    """A fixed random gate."""

    def __init__(self, seed: int) -> None:
        self.gate = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed))
        self.shown: torch.Tensor | None = None

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.shown = (hidden @ self.gate.T).softmax(-1)
        weights, ids = self.shown.topk(TOP_K)
        return ids, weights

    def scores(self) -> torch.Tensor | None:
        return self.shown

    @property
    def predicts(self) -> bool:
        return True

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ self.gate.T).topk(TOP_K).indices


def controller(
    settings: Settings, layers: int = LAYERS, experts: int = EXPERTS, quota: int = 2
) -> Controller:
    scheduler = make_scheduler(settings.scheduler, COSTS, True)
    return Controller(
        SlotPool([quota] * layers, 4, settings.budget == "shared"),
        COSTS,
        scheduler,
        scheduler,
        make_cache(settings.cache, layers, experts, TOP_K, settings),
        make_prefetcher(settings.prefetch, scheduler),
        1000,
    )


def recorded_run(settings: Settings, path: Path) -> tuple[float, Engine]:
    """Emulated time of a prefill and some decode steps, recorded to a file."""
    weights = [tiny_experts.layer(index=index) for index in range(LAYERS)]
    cpu, device = TorchExperts(keep=True), make_accelerator("emulated", torch.device("cpu"))
    assert device is not None
    made = controller(settings)
    for layer in weights:
        cpu.add_layer(layer)
    device.allocate(made.pool.slots, weights)
    routers = [GateRouter(index) for index in range(LAYERS)]
    engine = Engine(
        weights,
        routers,
        made,
        cpu,
        device,
        SimulatedClock(),
        0 if settings.prefetch == "off" else 2,
    )
    header = TraceHeader("tiny", LAYERS, EXPERTS, TOP_K, 1000, "a test", "recorded")
    with TraceWriter(path, header, score_top=EXPERTS) as writer:

        def record(call: CallRecord) -> None:
            writer.write(
                Call(call.layer, call.topk_ids, call.topk_weights, call.scores, call.predicted)
            )

        engine.recorder = record
        for seed, tokens in enumerate([9] + [1] * 25):
            hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
            for layer in range(LAYERS):
                ids, routing = routers[layer].route(hidden)
                hidden = hidden + engine.run(layer, hidden, ids, routing)
    return engine.clock.now_us(), engine


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"cache": "mrs", "budget": "layer", "prefetch": "impact", "scheduler": "greedy"},
        {"cache": "lru", "prefetch": "off", "scheduler": "ratio"},
    ],
)
def test_replay_predicts_the_emulated_engine(tmp_path: Path, choices: dict[str, str]) -> None:
    """Stated error: 1 %.

    The trace keeps scores in 16 bits, which can turn a close decision; nothing else differs.
    """
    settings = Settings.of(choices)
    spent_us, engine = recorded_run(settings, tmp_path / "t.trace")
    found = replay(read_trace(tmp_path / "t.trace"), controller(settings))
    assert sum(found.prefill_us) + sum(found.decode_us) == pytest.approx(spent_us, rel=0.01)
    assert found.counters.activations == engine.controller.counters.activations
    assert found.counters.cache_hits == pytest.approx(
        engine.controller.counters.cache_hits, rel=0.02
    )


def trace(decode: int = 60, locality: float = 0.5) -> Trace:
    made = synthetic(
        4,
        16,
        2,
        model="made",
        expert_bytes=1000,
        prompt_tokens=6,
        decode_tokens=decode,
        drift=0.5,
        locality=locality,
    )
    return with_predictions(made, 0.79)


def test_skipped_passes_are_not_judged() -> None:
    found = replay(trace(20), controller(Settings(), 4, 16, 4), skip=12)
    assert len(found.decode_us) == 8
    assert found.decode_counters.calls == 8 * 4
    assert 0.0 <= found.resident_rate <= 1.0


def test_belady_knows_the_next_use() -> None:
    made = trace(6)
    cache = BeladyCache(made)
    seen = [0] * 4
    rows = {
        layer: np.concatenate([c.ids for c in made.calls if c.layer == layer]) for layer in range(4)
    }
    for call in made.calls:
        cache.observe(call.layer, Scored(call.ids, call.weights, call.scores))
        seen[call.layer] += len(call.ids)
        later = rows[call.layer][seen[call.layer] :]
        for expert in range(16):
            uses = np.flatnonzero((later == expert).any(axis=1))
            assert cache.ranks[call.layer, expert] == pytest.approx(
                1 / (uses[0] + 1) if len(uses) else 0.0
            )


def test_the_oracle_is_faster_than_every_policy() -> None:
    made = trace()
    oracle = controller(Settings(), 4, 16, 4)
    oracle.restart(BeladyCache(made))
    best = sum(replay(with_predictions(made, 1.0), oracle).decode_us)
    for cache in ("adaptive", "lru", "mrs", "static"):
        assert best <= sum(replay(made, controller(Settings(cache=cache), 4, 16, 4)).decode_us)


@pytest.mark.parametrize("recall", [0.0, 0.5, 1.0])
def test_prefetch_is_not_slower_whatever_its_predictions(recall: float) -> None:
    """Guards against regressions; the claim over traces and machines is `eval.prefetch`'s."""
    made = with_predictions(trace(120), recall)
    with_it = sum(replay(made, controller(Settings(), 4, 16, 4)).decode_us)
    without = sum(replay(made, controller(Settings(prefetch="off"), 4, 16, 4)).decode_us)
    assert with_it <= without * 1.002
    if recall == 1.0:
        assert with_it < 0.97 * without
