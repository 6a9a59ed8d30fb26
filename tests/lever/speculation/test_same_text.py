"""Speculative decoding says exactly what plain decoding says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.low_bit import low_bit_copy
from lever_ext.flash.reader import Throttle
from lever_ext.speculation.draft_ahead import OverlappedDrafting
from lever_ext.target import load_target
from lever_ext.tree.calibrate import Candidates
from lever_ext.tree.candidates import CandidateTree
from lever_ext.tree.policies import POLICIES, make_policy
from tests.lever.helpers import (
    a_gate,
    least_budget,
    make_draft,
    prompt,
)

PROMPTS = 20 if "HYBRIMOE_LONG" in os.environ else 10

SHORT = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 24}


@pytest.fixture(scope="session")
def wanted(plain_models: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """What plain `generate` says to 20 prompts."""
    return {
        family: [plain_models[family].generate(prompt(seed), **SHORT) for seed in range(20)]
        for family in ("llama", "mixtral")
    }


@pytest.mark.parametrize(
    ("family", "prompts"), [pytest.param("llama", PROMPTS, marks=pytest.mark.slow), ("mixtral", 4)]
)
@pytest.mark.parametrize(
    "draft", ["low-bit", "n-gram", pytest.param("wrong", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("pruning", [False, True])
def test_greedy_output_is_token_identical(
    family: str,
    prompts: int,
    draft: str,
    pruning: bool,
    plain_models: dict[str, Any],
    packs: dict[str, Path],
    wanted: dict[str, list[torch.Tensor]],
) -> None:
    """Every policy on every prompt, with the least memory and with all of it in turns."""
    made = make_draft(draft, plain_models[family])
    kept = rows = 0
    for budget in (least_budget(packs[family]), None):
        target = load_target(packs[family], dram_budget=budget)
        target.set_gate(a_gate(plain_models[family]) if pruning else None)
        for name in POLICIES:
            decoder = LeverDecoding(made, make_policy(name), target, max_nodes=12, prune="always")
            for seed in range(0 if budget else 1, prompts, 2):
                found = target.model.generate(prompt(seed), custom_generate=decoder, **SHORT)
                assert torch.equal(found, wanted[family][seed]), (name, seed)
                cycles = decoder.stats.cycles
                assert decoder.stats.tokens == 8 == 1 + sum(cycle.accepted + 1 for cycle in cycles)
                kept, rows = kept + sum(c.kept for c in cycles), rows + sum(c.nodes for c in cycles)
            decoder.close()
        target.close()
    if draft != "n-gram":
        assert (kept < rows) == pruning


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_drafting_ahead_changes_nothing_that_is_said(
    family: str,
    plain_models: dict[str, Any],
    packs: dict[str, Path],
    wanted: dict[str, list[torch.Tensor]],
) -> None:
    target = load_target(
        packs[family], dram_budget=least_budget(packs[family]), throttle=Throttle.parse("0.01")
    )
    decoder = LeverDecoding(
        make_draft("low-bit", plain_models[family]), make_policy("lever"), target
    )
    decoder.draft_ahead = OverlappedDrafting(decoder.draft, least_wait=0.0, least_us=0.0)
    found = [
        target.model.generate(prompt(seed), custom_generate=decoder, **SHORT) for seed in range(4)
    ]
    assert all(torch.equal(*pair) for pair in zip(found, wanted[family], strict=False))
    assert decoder.draft_ahead.nodes > 20
    with pytest.raises(RuntimeError, match="no draft today"):
        decoder.draft.expand, before = fail_after(2, decoder.draft.expand), decoder.draft.expand
        target.model.generate(prompt(9), custom_generate=decoder, **SHORT)
    decoder.draft.expand = before
    assert torch.equal(
        target.model.generate(prompt(5), custom_generate=decoder, **SHORT), wanted[family][5]
    )
    decoder.close()
    target.close()


def fail_after(calls: int, expand: Any) -> Any:
    left = iter(range(calls))

    def failing(tree: CandidateTree, keys: Sequence[int]) -> list[Candidates]:
        if next(left, None) is None:
            raise RuntimeError("no draft today")
        return expand(tree, keys)

    return failing


@pytest.mark.slow
def test_twenty_prompts_in_one_conversation(
    plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    """The decoder keeps what it learned from prompt to prompt, and follow-ups reuse the
    draft's KV.
    """
    plain = plain_models["llama"]
    target = load_target(packs["llama"], dram_budget=least_budget(packs["llama"]))
    decoder = LeverDecoding(
        LanguageModelDraft(low_bit_copy(plain, 3, 32)), make_policy("lever"), target
    )
    decoder.latency.warm_start([(1, 1, 1e6), (16, 4, 1.2e6)])
    ids = prompt(3)
    for seed in range(20):
        ids = (
            prompt(seed, 5 + seed)
            if seed % 4
            else torch.cat([ids, prompt(seed, 3)], dim=1)[:, :120]
        )
        mask = torch.ones_like(ids)
        want = plain.generate(ids, attention_mask=mask, **GREEDY)
        ids = target.model.generate(ids, attention_mask=mask, custom_generate=decoder, **GREEDY)
        assert torch.equal(ids, want)
    target.close()
