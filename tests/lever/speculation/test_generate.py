"""What `generate` promises holds by speculation too: stopping, outputs, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_plugin.errors import SpeculationError
from lever_ext.decoding import LeverDecoding
from lever_ext.drafts.language_model import LanguageModelDraft
from lever_ext.target import load_target
from lever_ext.tree.policies import FixedBudget, make_policy
from tests.lever.helpers import (
    make_draft,
    prompt,
    tiny_config,
)

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 24}


@pytest.mark.parametrize(
    "stop", [{"max_new_tokens": 1}, {"max_new_tokens": 7}, {"eos_token_id": [9, 40, 24]}]
)
def test_stopping_is_generates_own(stop: dict[str, Any], plain_models: dict[str, Any]) -> None:
    plain = plain_models["llama"]
    settings = {"do_sample": False, "max_new_tokens": 30, **stop}
    decoder = LeverDecoding(make_draft("low-bit", plain), FixedBudget(12))
    assert torch.equal(
        plain.generate(prompt(1), custom_generate=decoder, **settings),
        plain.generate(prompt(1), **settings),
    )


def test_dict_output_and_streamer(plain_models: dict[str, Any]) -> None:
    plain, seen = plain_models["llama"], list[int]()

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            seen.extend(value.tolist())

        def end(self) -> None:
            seen.append(-1)

    extra = {"return_dict_in_generate": True, "output_scores": True}
    decoder = LeverDecoding(make_draft("low-bit", plain), FixedBudget(12), streamer=Streamer())
    ours = plain.generate(prompt(1), custom_generate=decoder, **GREEDY, **extra)
    theirs = plain.generate(prompt(1), **GREEDY, **extra)
    assert (
        torch.equal(ours.sequences, theirs.sequences)
        and len(ours.scores) == len(theirs.scores) == 24
    )
    torch.testing.assert_close(ours.scores[-1], theirs.scores[-1])
    assert seen == [*theirs.sequences[0, 9:].tolist(), -1]


def test_what_speculation_cannot_do_is_refused(plain_models: dict[str, Any]) -> None:
    plain = plain_models["llama"]
    decoder = LeverDecoding(make_draft("low-bit", plain), make_policy("lever"))
    with pytest.raises(SpeculationError, match="one sequence"):
        plain.generate(prompt(0).repeat(2, 1), custom_generate=decoder, **GREEDY)
    with pytest.raises(SpeculationError, match="padding"):
        mask = torch.tensor([[0] + [1] * 8])
        plain.generate(prompt(0), attention_mask=mask, custom_generate=decoder, **GREEDY)
    with pytest.raises(SpeculationError, match="needs a draft"):
        LeverDecoding(None, make_policy("lever"))


def test_a_draft_at_the_end_of_its_context_falls_silent(plain_models: dict[str, Any]) -> None:
    plain = plain_models["llama"]
    draft = make_draft("low-bit", plain)
    draft.context = 16
    decoder = LeverDecoding(draft, FixedBudget(6))
    assert torch.equal(
        plain.generate(prompt(1), custom_generate=decoder, **GREEDY),
        plain.generate(prompt(1), **GREEDY),
    )
    assert decoder.stats.cycles[0].nodes > 1 == decoder.stats.cycles[-1].nodes


@pytest.mark.parametrize(("vocabulary", "first"), [(40, 3), (40, 50), (64, 3), (200, 3), (576, 3)])
def test_a_draft_with_more_or_fewer_rows_of_padding(
    vocabulary: int, first: int, plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    """It likes its last token best, and the text holds tokens that the smallest draft lacks from
    some place on.
    """
    target, draft = load_target(packs["llama"]), a_draft_of(vocabulary)
    decoder = LeverDecoding(draft, FixedBudget(6), target)
    ids = torch.cat([prompt(1)[:, 1:] % 30 + 3, torch.tensor([[first]])], 1)
    want = plain_models["llama"].generate(ids, **GREEDY)
    assert torch.equal(target.model.generate(ids, custom_generate=decoder, **GREEDY), want)
    assert (decoder.stats.cycles[0].nodes > 1) == (first < vocabulary)
    decoder.close()
    target.close()


@pytest.mark.parametrize("vocabulary", [577, 1000])
def test_a_draft_with_another_vocabulary_is_refused(
    vocabulary: int, plain_models: dict[str, Any], packs: dict[str, Path]
) -> None:
    target, draft = load_target(packs["llama"]), a_draft_of(vocabulary)
    decoder = LeverDecoding(draft, make_policy("lever"), target)
    with pytest.raises(
        SpeculationError, match=rf"vocabulary of {vocabulary} tokens and the target one of 64"
    ):
        target.model.generate(prompt(0), custom_generate=decoder, **GREEDY)
    target.close()


def a_draft_of(vocabulary: int) -> LanguageModelDraft:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**tiny_config("llama"), "vocab_size": vocabulary})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(
        torch.arange(vocabulary, dtype=torch.float32), requires_grad=False
    )
    return LanguageModelDraft(model)
