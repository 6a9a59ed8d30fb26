"""2,000 greedy decode steps on late queues, with evictions and dropped prefetches, give the plain
twin's tokens.
"""

from __future__ import annotations

import random

import pytest
import torch
from engines import FixedRouter, build
from fake_streams import LazyStreams
from kernel_cases import random_layer
from watched import WatchedKernels, watched_copy

from hybrimoe_plugin.compute.gpu import slot_writer
from hybrimoe_plugin.compute.gpu.host_bytes import PlainBytes, StagedBytes
from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.engine import Engine

EXPERTS, HIDDEN, STEPS, VOCABULARY = 6, 32, 2000, 50
WEIGHTS = [
    random_layer(("Q8_0", "Q4_0", "F16"), HIDDEN, 32, EXPERTS, index=index) for index in range(2)
]


class Toy:
    """Embedding, MoE layers, head: just enough to have tokens. float64, so that no order of sums
    changes one.
    """

    def __init__(self, engine: Engine, routers: list[FixedRouter]) -> None:
        generator = torch.Generator().manual_seed(5)
        self.embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
        self.head = torch.randn(HIDDEN, VOCABULARY, generator=generator, dtype=torch.float64)
        self.engine = engine
        self.routers = routers
        for router in routers:
            router.gate = router.gate.double()

    def next(self, token: int, memory: torch.Tensor) -> tuple[int, torch.Tensor]:
        """The next token; `memory` [HIDDEN] stands in for attention, so that the sequence does not
        loop.

        It comes from tokens alone: fed back, sums' last bits would grow until they changed a token.
        """
        hidden = (self.embedding[token] + memory)[None]
        for layer, router in enumerate(self.routers):
            ids, routing = router.route(hidden)
            hidden = hidden + self.engine.run(layer, hidden, ids, routing.float())
        found = int((hidden @ self.head).argmax())
        return found, 0.9 * memory + 0.5 * self.embedding[found]


def disturb(engine: Engine, rng: random.Random) -> None:
    """Throw out a random expert that may be thrown out."""
    pool = engine.controller.pool
    layer = rng.randrange(len(engine.layers))
    candidates = pool.evictable(layer)
    if candidates:
        engine.controller.residency.evict(ExpertRef(layer, rng.choice(candidates)))


def tokens(toy: Toy, rng: random.Random | None) -> list[int]:
    found = [1]
    memory = torch.zeros(HIDDEN, dtype=torch.float64)
    for step in range(STEPS):
        token, memory = toy.next(found[-1], memory)
        found.append(token)
        if rng is not None and rng.random() < 0.3:
            disturb(toy.engine, rng)
        if step % 200 == 0:
            toy.engine.controller.pool.check_integrity()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["direct", "plain", "staged"])
def test_stress_gives_the_plain_twins_tokens(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"cache_ratio": 0.5, "prefetch": "score", "budget": "layer", "cache": "lru"}
    wanted = tokens(Toy(*build(weights=WEIGHTS, **settings)), None)
    assert len(set(wanted)) > 20, "a loop of few tokens would prove little"

    streams = LazyStreams(7)
    monkeypatch.setattr(slot_writer, "_copy_async", watched_copy(streams))
    host = StagedBytes(streams, ring=4, pinned=False) if way == "staged" else PlainBytes()
    # At depth 1 most prefetches wait, so many are dropped.
    device = SlotAccelerator(
        torch.device("cpu"),
        "fake",
        WatchedKernels(streams),
        streams,
        host,
        ahead_depth=1,
        direct=way != "plain",
    )
    engine, routers = build(device, WEIGHTS, **settings)
    rng = random.Random(3)
    # Predictions with a mind of their own: much is sent for nothing, and withdrawn.
    for router in routers:
        monkeypatch.setattr(
            router, "predict", lambda hidden: torch.tensor([rng.sample(range(EXPERTS), 2)])
        )
    found = tokens(Toy(engine, routers), rng)
    assert found == wanted
    counts = engine.controller.counters
    assert device.cancelled > 50
    assert counts.evictions > 500
    assert counts.prefetches >= counts.prefetches_used + counts.prefetches_wasted > 0
    device.close()
