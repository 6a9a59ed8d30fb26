"""Threads that share a target on flash, plain and by speculation: each gets the text that it gets
alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from at_once import in_threads

from hybrimoe_plugin.errors import BackendError
from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.drafts.ngram import NGramDraft
from lever_ext.placement.split import Place
from lever_ext.target import FlashTarget, load_target
from lever_ext.tree.policies import make_policy
from tests.lever.helpers import a_gate, least_budget, prompt

pytestmark = pytest.mark.slow

ANSWERS = int(os.environ.get("HYBRIMOE_LONG", 1))
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}
PLACES = (Place.STAYS, Place.COPIED, Place.CPU, Place.COPIED)
KINDS = ("llama", "llama, split", "qwen3_moe", "mixtral, split")


class Case(NamedTuple):
    target: FlashTarget
    plain: Any
    """The same model in memory."""


@pytest.fixture(params=KINDS)
def case(
    request: pytest.FixtureRequest, plain_models: dict[str, Any], packs: dict[str, Path]
) -> Iterator[Case]:
    family, _, split = request.param.partition(", ")
    there: dict[str, Any] = (
        {"device": "emulated", "vram_budget": "1GiB", "places": PLACES} if split else {}
    )
    budget = least_budget(packs[family])
    target = load_target(packs[family], dram_budget=budget, **there)
    yield Case(target, plain_models[family])
    target.close()


def decoder(target: FlashTarget, plain: Any, seed: int) -> LeverDecoding:
    draft = NGramDraft() if seed % 2 else LanguageModelDraft(plain)
    return LeverDecoding(draft, make_policy("fixed", 6), target, prune="always")


def test_each_thread_gets_what_it_gets_alone(case: Case) -> None:
    target, plain = case
    target.set_gate(a_gate(plain))
    shared, *others = (decoder(target, plain, seed) for seed in range(3))
    same_draft = LeverDecoding(shared.draft, make_policy("fixed", 6), target, prune="always")
    ways: list[Callable[..., Any]] = [
        target.model.generate,
        target.model.generate,
        target.model.generate,
        partial(target.model.generate, custom_generate=shared),
        partial(target.model.generate, custom_generate=shared),
        partial(target.model.generate, custom_generate=same_draft),
        *(partial(target.model.generate, custom_generate=other) for other in others),
    ]
    alone = [plain.generate(prompt(seed), **GREEDY).tolist() for seed in range(len(ways))]

    def answers(mine: int) -> list[Any]:
        found = []
        for _ in range(ANSWERS):
            try:
                found.append(ways[mine](prompt(mine), **GREEDY).tolist())
            except Exception as error:
                found.append(repr(error))
        return found

    found = in_threads([partial(answers, mine) for mine in range(len(ways))])
    wrong = [(mine, got) for mine, all_ in enumerate(found) for got in all_ if got != alone[mine]]
    assert not wrong
    for made in (shared, same_draft, *others):
        made.close()


def test_a_closed_target_says_so(plain_models: dict[str, Any], packs: dict[str, Path]) -> None:
    target = load_target(packs["llama"])
    target.close()
    with pytest.raises(BackendError, match="was closed"), torch.no_grad():
        target.model(prompt(0))
