"""Samplers draw as asked; rows do not disturb each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hybrimoe_plugin.errors import InputError
from hybrimoe_plugin.serve.requests import PromptError, Request, Sampling
from hybrimoe_plugin.serve.sampling import DrawError, Drawn, Sampler, SamplingError, draw

from .vocabularies import END, model_of

SIZE = 40


def sampler(prompt: tuple[int, ...] = (2, 3), ends: Any = END, **sampling: Any) -> Sampler:
    return Sampler(model_of(SIZE, ends), Request("r", prompt, sampling=Sampling(**sampling)))


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed))


def tokens(one: Sampler, steps: int) -> list[int]:
    """Of so many steps, whose logits are always the same ones."""
    return [found.token.id for i in range(steps) for found in good(draw([one], logits(seed=i)))]


def good(results: list[Any]) -> list[Drawn]:
    assert all(isinstance(found, Drawn) for found in results), results
    return results


def test_temperature_zero_takes_the_likeliest() -> None:
    rows = logits(3)
    found = good(draw([sampler(temperature=0.0), sampler(temperature=0), sampler(top_k=1)], rows))
    assert [one.token.id for one in found] == rows.argmax(dim=-1).tolist()


@pytest.mark.parametrize("seed", [0, 1, -1, -(10**30), 10**30, 2**64 - 1, 2**63])
def test_a_seed_gives_the_same_answer_beside_others(seed: int) -> None:
    alone = tokens(sampler(seed=seed, ends=None), 12)
    one, other = sampler(seed=seed, ends=None), sampler(ends=None)
    beside = []
    for i in range(12):
        found = good(draw([other, one], torch.cat([logits(seed=50 + i), logits(seed=i)])))
        beside.append(found[1].token.id)
    assert beside == alone


def test_without_a_seed_answers_differ() -> None:
    assert tokens(sampler(ends=None), 30) != tokens(sampler(ends=None), 30)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_fail_alone(bad: float) -> None:
    rows = logits(3)
    rows[1, 4] = bad
    samplers = [sampler(seed=i) for i in range(3)]
    found = draw(samplers, rows)
    assert isinstance(found[1], DrawError)
    good([found[0], found[2]])


def test_no_token_left_fails_alone() -> None:
    rows = logits(2)
    rows[0] = -torch.inf
    found = draw([sampler(temperature=0.0), sampler()], rows)
    assert isinstance(found[0], DrawError)
    good(found[1:])


def test_a_row_that_failed_has_not_changed() -> None:
    one, other = sampler(seed=3, ends=None), sampler(seed=3, ends=None)
    assert isinstance(draw([one], torch.full((1, SIZE), math.nan))[0], DrawError)
    assert tokens(one, 8) == tokens(other, 8)


def test_an_interrupted_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = sampler(seed=3, ends=None), sampler(seed=4, ends=None)
    with monkeypatch.context() as patch:

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(second, "_pick", interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw([first, second], logits(2))
    assert tokens(first, 8) == tokens(sampler(seed=3, ends=None), 8)


@pytest.mark.parametrize("shape", [(2, SIZE), (SIZE,), (1, 1, SIZE), (1, 0)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shape"):
        draw([sampler()], torch.zeros(shape))


def test_no_answers_need_no_logits() -> None:
    assert draw([], torch.zeros(0, SIZE)) == []


def test_another_vocabulary_is_an_error() -> None:
    assert isinstance(draw([sampler()], torch.zeros(1, SIZE + 1))[0], DrawError)


@pytest.mark.parametrize("ends", [END, [0, END]])
def test_tokens_that_end_the_text(ends: Any) -> None:
    rows = torch.zeros(3, SIZE)
    rows[:, END] = 50.0
    samplers = [
        sampler(ends=ends, temperature=0.0),
        sampler(ends=ends, temperature=0.0, ignore_eos=True),
        sampler(ends=None, temperature=0.0, ignore_eos=True, stop_token_ids=(END,)),
    ]
    found = good(draw(samplers, rows))
    assert [(one.kept, one.last) for one in found] == [(False, True), (True, False), (False, True)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_before_the_least_tokens(temperature: float) -> None:
    one = sampler(temperature=temperature, min_tokens=3, stop_token_ids=(7,))
    rows = torch.zeros(1, SIZE)
    rows[:, [END, 7]] = 50.0
    found = [good(draw([one], rows))[0] for _ in range(4)]
    assert [drawn.last for drawn in found] == [False, False, False, True]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = logits()
    one = sampler(temperature=0.1, top_k=1, logit_bias={5: 100.0}, logprobs=3)
    (found,) = good(draw([one], row))
    expected = row[0].log_softmax(dim=-1)
    assert found.token.id == 5 and found.token.logprob == float(expected[5])
    best = expected.topk(3)
    assert found.token.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@pytest.mark.parametrize(("asked", "told"), [(0, 0), (5, 5), (1000, SIZE - 1)])
def test_as_many_logprobs_as_there_are(asked: int, told: int) -> None:
    row = logits()
    row[0, 3] = -torch.inf
    (found,) = good(draw([sampler(logprobs=asked, temperature=0.0)], row))
    assert len(found.token.top) == told and found.token.logprob is not None


def test_half_precision_rows() -> None:
    row = logits().bfloat16()
    (found,) = good(draw([sampler(temperature=0.0)], row))
    assert row[0, found.token.id] == row.max()


WRONG: list[dict[str, Any]] = [
    {"temperature": -1.0},
    {"temperature": math.nan},
    {"temperature": "1"},
    {"temperature": 10**400},
    {"top_p": 1.5},
    {"top_k": -1},
    {"top_k": 1.0},
    {"min_p": math.inf},
    {"repetition_penalty": 0.0},
    {"presence_penalty": math.nan},
    {"frequency_penalty": math.inf},
    {"logit_bias": {SIZE: 1.0}},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {1: math.nan}},
    {"stop_token_ids": (SIZE,)},
    {"stop_token_ids": (10**5000,)},
    {"min_tokens": -1},
    {"logprobs": -1},
    {"seed": 1.5},
    {"seed": True},
    {"grammar": object(), "ignore_eos": True},
]


@pytest.mark.parametrize("setting", WRONG, ids=lambda setting: "+".join(setting))
def test_values_that_make_no_sense_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(SamplingError, match=next(iter({*setting} - {"grammar"}))):
        sampler(**setting)


def test_a_prompt_with_unknown_tokens_is_refused() -> None:
    with pytest.raises(PromptError, match="prompt"):
        sampler(prompt=(SIZE,), repetition_penalty=1.1)
