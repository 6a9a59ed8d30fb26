"""Forecast routing and early reads: right for true copies of a target, harmless for other
drafts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.ngram import NGramDraft
from lever_ext.drafts.runner import HostRunner
from lever_ext.flash.dram_plan import DRAFT_PREFETCH, PREFETCH, plan_dram
from lever_ext.flash.pack import FlashPack
from lever_ext.speculation.routing_forecast import RoutingForecast
from lever_ext.target import FlashTarget, load_target
from lever_ext.tree.expert_union import ExpertUnion
from lever_ext.tree.policies import POLICIES, make_policy
from lever_ext.tree.token_tree import DraftedToken
from tests.lever.helpers import pack_model, tiny_model

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 24}


def upcycled(dense: Any, moe: Any) -> None:
    """Give an MoE model the dense one's weights: every expert is its FFN. Mutates."""
    moe.load_state_dict(
        {k: v for k, v in dense.state_dict().items() if ".mlp." not in k}, strict=False
    )
    with torch.no_grad():
        for ours, theirs in zip(moe.model.layers, dense.model.layers, strict=True):
            inner = torch.cat([theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight])
            ours.mlp.experts.gate_up_proj[:] = inner
            ours.mlp.experts.down_proj[:] = theirs.mlp.down_proj.weight


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A dense model, the MoE that was made from it, and the MoE's pack."""
    dense, moe = tiny_model("llama", 3), tiny_model("mixtral", 4)
    upcycled(dense, moe)
    return dense, moe, pack_model(moe, "mixtral", tmp_path_factory.mktemp("upcycled"))


@pytest.fixture
def target(pair: tuple[Any, Any, Path]) -> Iterator[FlashTarget]:
    """All decoder layers in DRAM, one expert of eight for each, and buffers to read ahead."""
    pack = FlashPack.open(pair[2])
    whole = plan_dram(pack, None).nbytes
    step = max(block.nbytes for block in pack.blocks("expert")) // 2
    budget = next(b for b in range(0, whole, step) if _fits(pack, b))
    pack.close()
    loaded = load_target(pair[2], dram_budget=budget)
    yield loaded
    loaded.close()


def _fits(pack: FlashPack, budget: int) -> bool:
    try:
        found = plan_dram(pack, budget)
    except Exception:
        return False
    return found.layers == 4 and found.expert_slots >= 1 and found.prefetch >= PREFETCH


def test_forecast_of_a_true_copy_is_right_and_changes_no_token(
    pair: tuple[Any, Any, Path], target: FlashTarget
) -> None:
    dense, moe, _ = pair
    ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    want = moe.generate(ids, **GREEDY)
    for name in POLICIES:
        decoder = LeverDecoding(
            None if name == "none" else LanguageModelDraft(dense), make_policy(name), target
        )
        assert (decoder.forecast is None) == (name == "none")
        for _ in range(2):
            assert torch.equal(
                target.model.generate(ids, custom_generate=decoder, **GREEDY), want
            ), name
        decoder.close()
        assert decoder.reads is not None
        if name != "none":
            assert decoder.reads.forecast_share > 0.85, (
                "a copy that is exact has the target's routing"
            )
    assert target.experts is not None
    counters = target.experts.counters
    assert counters.prefetches_used > counters.prefetches / 2 > 20


def test_drafts_that_know_nothing_of_the_target_get_no_say(
    pair: tuple[Any, Any, Path], target: FlashTarget, plain_models: dict[str, Any]
) -> None:
    dense, moe, _ = pair
    assert RoutingForecast.of(target, NGramDraft()) is None
    assert RoutingForecast.of(target, LanguageModelDraft(dense, runner=HostRunner(dense))) is None
    ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(1))
    stranger = LeverDecoding(
        LanguageModelDraft(plain_models["llama"]), make_policy("lever"), target
    )
    assert torch.equal(
        target.model.generate(ids, custom_generate=stranger, **GREEDY), moe.generate(ids, **GREEDY)
    )
    assert stranger.reads is not None and stranger.reads.forecast_share < 0.75, (
        "wrong forecasts are found out"
    )
    stranger.close()


def test_forecast_equals_the_routers(target: FlashTarget, pair: tuple[Any, Any, Path]) -> None:
    forecast = RoutingForecast.of(target, LanguageModelDraft(pair[0]))
    assert forecast is not None
    inner = list(torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0)))
    found = forecast(inner)
    assert found.shape == (5, 4, 2)
    for layer, hidden in enumerate(inner):
        want = pair[1].model.layers[layer].mlp.gate(hidden)[2]
        np.testing.assert_array_equal(np.sort(found[:, layer]), np.sort(want.numpy()))


def test_early_reads_serve_the_pass_and_free_their_buffers(target: FlashTarget) -> None:
    assert target.experts is not None
    cache, token = target.experts, torch.tensor([[7]])
    with torch.no_grad():
        target.model(token)
        chosen = np.stack([cache.chosen[layer][0] for layer in range(4)])
        wrong = (chosen + 1) % 8
        for ids in (chosen, wrong):
            free, before = len(cache._prefetch_free), cache.counters.reads
            assert free == target.residency.prefetch
            cache.prefetch(ids)
            cache.prefetch(ids)
            assert cache.counters.reads - before == free - len(cache._prefetch_free), (
                "nothing is read twice"
            )
            want = target.model(token).logits
            assert len(cache._prefetch_free) == target.residency.prefetch and not cache._prefetched
            torch.testing.assert_close(target.model(token).logits, want)


def test_memory_left_over_becomes_buffers_for_early_reads(pair: tuple[Any, Any, Path]) -> None:
    pack = FlashPack.open(pair[2])
    step = max(block.nbytes for block in pack.blocks("expert"))
    found = [
        plan_dram(pack, b) for b in range(0, plan_dram(pack, None).nbytes, step) if _fits(pack, b)
    ]
    pack.close()
    assert {residency.expert_slots for residency in found} >= set(range(1, 7))
    for residency in found:
        assert PREFETCH <= residency.prefetch <= PREFETCH + DRAFT_PREFETCH
    assert any(residency.prefetch > PREFETCH for residency in found)


def test_forecasts_price_a_node_before_its_token_was_seen() -> None:
    union = ExpertUnion(layers=2, experts=8, top_k=2, read_us=10.0)
    union.bend = (0.0, 1.0)
    union.set_resident([(0, 0), (0, 1), (1, 0), (1, 1)])
    union.forecast(5, np.array([[0, 1], [0, 1]]), share=1.0)
    union.forecast(6, np.array([[2, 3], [4, 5]]), share=1.0)
    assert union.start().peek(DraftedToken(9, 5)) == pytest.approx(0.0, abs=1e-6)
    start = union.start()
    assert start.add(DraftedToken(9, 6)) == pytest.approx(40.0)
    assert start.peek(DraftedToken(11, 6)) == pytest.approx(40.0), (
        "the same experts cost nothing more"
    )
    np.testing.assert_allclose(
        union.prefixes([DraftedToken(9, 5), DraftedToken(9, 6)]), [0.0, 40.0], atol=1e-6
    )
    union.forget_forecasts({5})
    assert 0 < union.start().peek(DraftedToken(9, 6)) < 40.0


def test_expected_reads_bend_to_what_passes_really_read() -> None:
    """Rows that choose alike: multiplied chances expect more experts than are read, the more the
    larger the tree.
    """
    union = ExpertUnion(layers=4, experts=16, top_k=2, read_us=1.0, step=0.0)
    rng = np.random.default_rng(0)

    def true_reads(rows: int) -> float:
        return float(64 * (1 - np.exp(-0.4 * (-rows * np.log(1 - 2 / 16)) ** 0.6)))

    for _ in range(60):
        rows = int(rng.integers(1, 40))
        chosen = np.argsort(rng.random((4, rows, 16)))[:, :, :2]
        drafted = [DraftedToken(int(token)) for token in rng.integers(0, 10**9, rows)]
        union.observe(drafted, chosen, reads=round(true_reads(rows)))
    for rows in (2, 10, 30):
        price = union.prefixes([DraftedToken(-token - 1) for token in range(rows)])[-1]
        assert price == pytest.approx(true_reads(rows), rel=0.1)
