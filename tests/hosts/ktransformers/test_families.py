"""Our operators under kTransformers' own injection give the logits of its own modules with plain
torch experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import classic
import pytest
import torch

pytestmark = [classic.needs_host, pytest.mark.usefixtures("host")]
EMULATED = {"accelerator": "emulated", "prefill_device": "cuda", "generate_device": "cuda"}
SCHEDULERS = ("hybrimoe", "greedy", "static", "accelerator_only", "cpu_only")


@pytest.fixture(scope="module")
def oracles(host: object, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    del host
    made = {}
    for family in classic.FAMILIES:
        built = classic.model(family)
        made[family] = built, classic.write(built, tmp_path_factory.mktemp(family))
    return made


@pytest.mark.parametrize("family", classic.FAMILIES)
def test_logits_equal_its_own_modules(family: str, oracles: dict[str, Any], tmp_path: Path) -> None:
    oracle, folder = oracles[family]
    built = classic.load(classic.config(family), classic.rules(family, tmp_path), folder)
    for count, steps in ((13, 4), (70, 2), (4, 3)):
        prompt = classic.tokens(count, seed=count)
        wanted = classic.plain_logits(oracle, prompt, steps)
        torch.testing.assert_close(classic.host_logits(built, prompt, steps), wanted)
    stats = built.hybrimoe.stats()
    assert stats.experts_cpu == stats.activations > 0
    built.hybrimoe.close()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", classic.FAMILIES)
def test_every_schedule_on_an_accelerator_gives_the_same(
    family: str, scheduler: str, oracles: dict[str, Any], tmp_path: Path
) -> None:
    """The emulated accelerator: plans, cache, and prefetch by the host's own routers."""
    oracle, folder = oracles[family]
    rules = classic.rules(family, tmp_path, **EMULATED, scheduler=scheduler, cache_ratio=0.25)
    built = classic.load(classic.config(family), rules, folder)
    prompt = classic.tokens(12, seed=1)
    torch.testing.assert_close(
        classic.host_logits(built, prompt, 4), classic.plain_logits(oracle, prompt, 4)
    )
    stats = built.hybrimoe.stats()
    assert stats.activations == stats.experts_cpu + stats.experts_accelerator > 0
    if scheduler in ("accelerator_only", "cpu_only"):
        assert (stats.experts_cpu == 0, stats.experts_accelerator == 0)[scheduler == "cpu_only"]
    built.hybrimoe.close()


@pytest.mark.parametrize("family", classic.FAMILIES)
def test_routers_show_and_predict_what_they_choose(
    family: str, oracles: dict[str, Any], tmp_path: Path
) -> None:
    _, folder = oracles[family]
    built = classic.load(
        classic.config(family), classic.rules(family, tmp_path, **EMULATED, cache_ratio=0.5), folder
    )
    engine = built.hybrimoe.engines[0]
    calls: list[Any] = []
    built.hybrimoe.record(calls.append)
    seen: list[torch.Tensor] = []
    for router in engine.routers:  # hooks do not see predictions
        router.gate.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    classic.host_logits(built, classic.tokens(9), 2)
    assert len(calls) == len(seen) == 3 * len(engine.layers)
    built.hybrimoe.record(None)
    for call, hidden in zip(calls, seen, strict=True):
        predicted = engine.routers[call.layer].predict(hidden.reshape(-1, hidden.shape[-1]))
        assert (sorted_rows(predicted.numpy()) == sorted_rows(call.topk_ids)).all()
        if getattr(built.config, "n_group", 1) == 1:  # groups limit the choice otherwise
            best = call.scores.argsort(axis=1)[:, ::-1][:, : call.topk_ids.shape[1]]
            assert (sorted_rows(best) == sorted_rows(call.topk_ids)).all()
    built.hybrimoe.close()


def sorted_rows(ids: Any) -> Any:
    ids = ids.copy()
    ids.sort(axis=1)
    return ids


def test_yarn_models_are_served_too(host: object, tmp_path: Path) -> None:
    del host
    for family in ("DeepSeek-V2-Lite", "DeepSeek-V3"):
        oracle = classic.model(family, rope_scaling=classic.YARN)
        folder = classic.write(oracle, tmp_path / family)
        made = classic.config(family, rope_scaling=classic.YARN)
        built = classic.load(made, classic.rules(family, tmp_path), folder)
        prompt = classic.tokens(20)
        torch.testing.assert_close(
            classic.host_logits(built, prompt, 3), classic.plain_logits(oracle, prompt, 3)
        )
        built.hybrimoe.close()
