"""Layers that are launched ahead of the host give the plain model's tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch
from chained import links_of, proven
from graphed import Loader, greedy
from late_device import late_device
from replayed import Replayed

from hybrimoe_plugin.compute.gpu.slot_accelerator import SlotAccelerator
from hybrimoe_plugin.core import ExpertRef
from hybrimoe_plugin.decode.chain.chain import Chain, LayerCall
from hybrimoe_plugin.decode.cuda_layer import CudaLayer

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3")


class Watched:
    """Counts what chains do."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.missed = self.void = self.hits = 0
        compute, note = LayerCall.compute_missing, Chain._note_hits

        def compute_missing(call: LayerCall) -> None:
            self.missed += 1
            self.void += call.whole
            compute(call)

        def note_hits(chain: Chain) -> None:
            self.hits += len(chain._hits)
            note(chain)

        patch.setattr(LayerCall, "compute_missing", compute_missing)
        patch.setattr(Chain, "_note_hits", note_hits)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_tokens_are_the_plain_models(
    family: str, ratio: float, load_captured: Loader, watched: Watched
) -> None:
    model = load_captured(family, Replayed(), cache_ratio=ratio)
    for link in links_of(model):
        link.sure = 0.0
    prompt = tiny.tokens(7)
    assert greedy(model, prompt) == greedy(tiny.model(family), prompt)
    assert proven(model)
    assert watched.hits
    if ratio < 1:
        assert watched.void, "layers were launched behind a miss"
    else:
        assert not watched.missed
    model.hybrimoe.check_integrity()


def test_the_counters_are_the_same_as_where_the_host_waits(load_captured: Loader) -> None:
    """But for times, on a clock that is simulated."""
    found = []
    for path in ("wait", "auto"):
        model = load_captured("qwen3_moe", Replayed(), cache_ratio=1.0, host_path=path)
        greedy(model, tiny.tokens(6))
        counters = model.hybrimoe.stats()
        counters.plan_us = 0.0
        found.append(counters)
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_late_queues_evictions_and_dropped_prefetches(
    family: str,
    seed: int,
    load_captured: Loader,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = greedy(tiny.model(family), tiny.tokens(7))
    rng = random.Random(seed)
    with late_device(monkeypatch, seed) as capture:
        model = load_captured(family, capture, cache_ratio=0.7)
        call = CudaLayer.__call__

        def disturbed(layer: CudaLayer, *args: Any, **kwargs: Any) -> Any:
            if rng.random() < 0.2:
                disturb(model, rng)
            return call(layer, *args, **kwargs)

        monkeypatch.setattr(CudaLayer, "__call__", disturbed)
        for link in links_of(model):
            link.sure = rng.choice((0.0, 0.3, 2.0))
        assert greedy(model, tiny.tokens(7)) == plain
        assert proven(model)
        assert watched.hits
        model.hybrimoe.check_integrity()


def disturb(model: Any, rng: random.Random) -> None:
    """Throw out a random expert that may be thrown out."""
    (engine,) = model.hybrimoe.engines
    layer = rng.randrange(len(engine.layers))
    candidates = engine.controller.pool.evictable(layer)
    if candidates:
        engine.controller.residency.evict(ExpertRef(layer, rng.choice(candidates)))


def test_a_chain_that_differs_is_not_used(
    load_captured: Loader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resident = SlotAccelerator.resident

    def wrong(self: SlotAccelerator, *args: Any) -> torch.Tensor:
        return resident(self, *args) * 1.5

    monkeypatch.setattr(SlotAccelerator, "resident", wrong)
    model = load_captured("mixtral", Replayed(), cache_ratio=1.0)
    prompt = tiny.tokens(6)
    assert greedy(model, prompt) == greedy(tiny.model("mixtral"), prompt)
    assert not proven(model)
    notices = [text for text in caplog.messages if "waits for the host" in text]
    assert len(notices) == 1 and "gives something else" in notices[0]
