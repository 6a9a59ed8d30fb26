"""Logits before drawing are those that transformers' `generate` draws from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybrimoe_plugin.serve.requests import Request, Sampling
from hybrimoe_plugin.serve.sampling import Drawn, Sampler, draw

PROMPT = (4, 9, 4)
STEPS = 6
END = 1


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=END,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({"temperature": 0.5}, {"temperature": 0.5}),
    "top_k": ({"top_k": 5}, {"top_k": 5}),
    "top_p": ({"top_p": 0.7}, {"top_p": 0.7}),
    "min_p": ({"min_p": 0.1}, {"min_p": 0.1}),
    "repetition_penalty": ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    "logit_bias": ({"logit_bias": {7: 2.0}}, {"sequence_bias": {(7,): 2.0}}),
    "min_tokens": ({"min_tokens": 4}, {"min_new_tokens": 4}),
    "all": (
        {
            "temperature": 0.8,
            "top_k": 20,
            "top_p": 0.9,
            "min_p": 0.01,
            "repetition_penalty": 1.2,
            "logit_bias": {7: 2.0, 9: -3.0},
            "min_tokens": 3,
        },
        {
            "temperature": 0.8,
            "top_k": 20,
            "top_p": 0.9,
            "min_p": 0.01,
            "repetition_penalty": 1.2,
            "sequence_bias": {(7,): 2.0, (9,): -3.0},
            "min_new_tokens": 3,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_distribution_of_each_step(model: Any, name: str) -> None:
    ours, theirs = CASES[name]
    torch.manual_seed(1)
    made = model.generate(
        torch.tensor([PROMPT]),
        do_sample=True,
        max_new_tokens=STEPS,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **{"top_k": 0, **theirs},
    )
    sampler = Sampler(model, Request("r", PROMPT, sampling=Sampling(**ours)))
    answer = made.sequences[0, len(PROMPT) :].tolist()
    for raw, expected, token in zip(made.logits, made.scores, answer, strict=True):
        candidates = sampler._filters.narrow(sampler._scores(raw[0]))
        found = torch.zeros(64)
        ids = torch.arange(64) if candidates.ids is None else candidates.ids
        found[ids] = candidates.scores.softmax(dim=-1)
        torch.testing.assert_close(found, expected[0].softmax(dim=-1))
        forced = torch.full((1, 64), -torch.inf)
        forced[0, token] = 0.0
        (one,) = draw([sampler], forced)
        assert isinstance(one, Drawn) and one.token.id == token


def test_greedy_answers(model: Any) -> None:
    made = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=STEPS, pad_token_id=0
    )
    sampler = Sampler(model, Request("r", PROMPT, sampling=Sampling(temperature=0.0)))
    ids = list(PROMPT)
    for _ in range(STEPS):
        (found,) = draw([sampler], model(torch.tensor([ids])).logits[:, -1])
        assert isinstance(found, Drawn)
        ids.append(found.token.id)
        if found.last:
            break
    assert ids == made[0].tolist()


def test_penalties_count_the_answers_tokens_alone(model: Any) -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(model, Request("r", PROMPT, sampling=sampling))
    for token in (7, 7, 9):
        forced = torch.full((1, 64), -torch.inf)
        forced[0, token] = 0.0
        draw([sampler], forced)
    expected = torch.zeros(64)
    expected[7] = -0.5 - 2 * 0.25
    expected[9] = -0.5 - 0.25
    assert torch.equal(sampler._scores(torch.zeros(64)), expected)
