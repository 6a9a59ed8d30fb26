"""What is sampled of engines and of targets on flash."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loading import injected
from tiny import write

from hybrimoe_plugin.engine.engine import Engine
from hybrimoe_plugin.policy.slots import SlotPool
from hybrimoe_plugin.serve.live.places import Place
from hybrimoe_plugin.serve.live.rates import Counted, Window
from hybrimoe_plugin.serve.live.sources import EngineSource, StoreSource

KINDS = {
    "emulated": {"accelerator": "emulated", "cache_ratio": 0.25},
    "cpu": {"accelerator": "none", "cpu_backend": "ggml"},
}


@pytest.fixture(scope="module", params=KINDS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    path = write(tmp_path_factory.mktemp("tiny"), "mixtral")
    made = injected(path, **KINDS[request.param])
    made.kind = request.param
    yield made
    made.hybrimoe.close()


@pytest.fixture
def source(model: Any) -> Iterator[EngineSource]:
    made = EngineSource(model.hybrimoe.engines)
    made.begin()
    yield made
    made.end()


def decode(model: Any, tokens: int = 4) -> torch.Tensor:
    prompt = torch.arange(3, 60).reshape(1, -1)
    made: torch.Tensor = model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    return made


def test_every_expert_has_a_place(model: Any, source: EngineSource) -> None:
    decode(model)
    sample = source.sample()
    (engine,) = model.hybrimoe.engines
    for row, cached in enumerate(engine.controller.pool.cached):
        there = np.flatnonzero(sample.places[row] != Place.CPU)
        assert set(there.tolist()) == set(cached)
    assert (model.kind == "cpu") == (sample.places == Place.CPU).all()


def test_each_use_is_shown_once(model: Any, source: EngineSource) -> None:
    used: list[set[int]] = [set(), set()]
    inner = model.hybrimoe.engines[0].watcher

    def watcher(call: Any) -> None:
        used[call.step.layer].update(call.step.plan.cpu, call.step.plan.accelerator)
        inner(call)

    model.hybrimoe.engines[0].watcher = watcher
    decode(model)
    shown = source.sample().used
    assert [set(np.flatnonzero(row).tolist()) for row in shown] == used
    assert all(used)
    assert not source.sample().used.any()


def test_tokens_of_prompts_and_of_answers_are_told_apart(model: Any, source: EngineSource) -> None:
    source.sample()
    decode(model, tokens=4)
    rates = source.sample().rates
    # 57 tokens of the prompt in one pass, and three passes behind it.
    assert rates.prompt_s / rates.tokens_s == pytest.approx(57 / 3)


def test_lanes_show_who_was_busy(model: Any, source: EngineSource) -> None:
    decode(model, tokens=8)
    lanes = source.sample().lanes
    assert lanes is not None
    assert lanes.max(axis=1).astype(bool).tolist()[0] or model.kind == "emulated"
    assert lanes[1:].any() == (model.kind == "emulated")


def test_watching_changes_no_decision(model: Any) -> None:
    (engine,) = model.hybrimoe.engines
    source = EngineSource([engine])
    made = []
    for watched in (False, True):
        if watched:
            source.begin()
        made.append(decode(model))
        source.end()
        assert engine.unplanned == (model.kind == "cpu")
    assert torch.equal(*made)


def test_nothing_is_kept_while_nobody_watches(model: Any) -> None:
    (engine,) = model.hybrimoe.engines
    source = EngineSource([engine])
    assert engine.watcher is None
    source.begin()
    source.end()
    assert engine.watcher is None


def test_a_target_on_flash_shows_what_is_in_memory_and_what_was_chosen() -> None:
    pool = SlotPool([1, 1], staging=2)
    pool.place(1, 2)
    ranks = SimpleNamespace(ranks=np.zeros((2, 4)))
    chosen: dict[int, Any] = {}
    store: Any = SimpleNamespace(layers=[1, 3], policy=ranks, pool=pool, chosen=chosen)
    source = StoreSource(store)
    source.begin()
    chosen[0] = np.array([[1, 3]])
    sample = source.sample()
    assert sample.places.tolist() == [[Place.FLASH] * 4, [3, 3, Place.CPU, 3]]
    assert np.argwhere(sample.used).tolist() == [[0, 1], [0, 3]]
    assert sample.lanes is None
    assert not source.sample().used.any()


def test_rates_are_of_the_last_two_seconds() -> None:
    window = Window()
    assert window.rates().tokens_s == 0.0
    for at in range(10):
        window.add(float(at), Counted(tokens=at, prompt_tokens=0, hits=1, needed=4))
    assert window.rates().tokens_s == (9 + 8) / 2
    assert window.rates().hit_rate == 0.25


def test_an_engine_is_watched_through_a_failed_call(model: Any, source: EngineSource) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("broken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_pass_time", broken)
        patch.setattr(Engine, "_compute_whole", broken)
        with pytest.raises(ValueError, match="broken"):
            decode(model)
    source.sample()
    decode(model)
    assert source.sample().used.any()
