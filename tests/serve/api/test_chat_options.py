"""Options of chat completions, sent by OpenAI's own client, reach the scheduler or are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from byte_language import byte_tokenizer, named_model
from openai_server import NAME, Talk, talking

from hybrimoe_plugin.serve.service import Limits

ANSWER = "Grüße, world"


@pytest.fixture(scope="module")
def talk() -> Iterator[Talk]:
    with talking(ANSWER) as made:
        yield made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5),
        ("top_p", 0.25),
        ("presence_penalty", -1.5),
        ("frequency_penalty", 2.0),
        ("seed", 2**63 - 1),
        ("top_k", 7),
        ("min_p", 0.125),
        ("repetition_penalty", 1.5),
        ("min_tokens", 3),
        ("ignore_eos", True),
    ],
)
def test_an_option_reaches_the_scheduler(talk: Talk, name: str, value: Any) -> None:
    talk.chat(extra_body={name: value})
    assert getattr(talk.sampling(), name) == value


def test_options_in_another_form_reach_the_scheduler(talk: Talk) -> None:
    talk.chat(
        logit_bias={"65": -100, "66": 5},
        extra_body={"stop_token_ids": [1, 2], "top_k": -1},
        temperature=0.00001,
    )
    sampling = talk.sampling()
    assert sampling.logit_bias == {65: -100.0, 66: 5.0}
    assert sampling.stop_token_ids == (1, 2)
    assert sampling.top_k == 0
    assert sampling.temperature == 0.0


def test_nothing_given_is_openais_default(talk: Talk) -> None:
    talk.chat()
    sampling = talk.sampling()
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert (sampling.seed, sampling.logprobs, sampling.grammar) == (None, None, None)
    assert talk.scheduler.requests[-1].max_tokens is None


def test_null_is_as_good_as_nothing(talk: Talk) -> None:
    talk.chat(temperature=None, stop=None, n=None, extra_body={"tools": None, "top_k": None})
    assert talk.sampling().temperature == 1.0


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_at_its_limit(talk: Talk, name: str) -> None:
    found = talk.chat(**{name: 2})
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("Gr", "length")
    assert found.usage.completion_tokens == 2


def test_choices_have_seeds_of_their_own(talk: Talk) -> None:
    before = len(talk.scheduler.requests)
    found = talk.chat(n=3, seed=5)
    assert [choice.message.content for choice in found.choices] == [ANSWER] * 3
    assert sorted(r.sampling.seed for r in talk.scheduler.requests[before:]) == [5, 6, 7]


def test_usage_counts_the_prompt_once(talk: Talk) -> None:
    talk.scheduler.cached_tokens = 4
    found = talk.chat(n=2)
    talk.scheduler.cached_tokens = 0
    prompt, answer = len(talk.scheduler.requests[-1].prompt), len(ANSWER.encode())
    assert found.usage.prompt_tokens == prompt
    assert found.usage.completion_tokens == 2 * answer
    assert found.usage.total_tokens == prompt + 2 * answer
    assert found.usage.prompt_tokens_details.cached_tokens == 4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stop": "e, "}, "Grüß"),
        ({"stop": ["x", "world", ", w"]}, "Grüße"),
        ({"stop": ["ß"], "extra_body": {"include_stop_str_in_output": True}}, "Grüß"),
    ],
)
def test_a_stop_string_ends_the_answer(talk: Talk, options: Any, text: str) -> None:
    choice = talk.chat(**options).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text, "stop")


def test_logprobs_tell_tokens_and_bytes(talk: Talk) -> None:
    found = talk.chat(logprobs=True, top_logprobs=2, max_tokens=3).choices[0].logprobs
    assert talk.sampling().logprobs == 2
    assert [bytes(entry.bytes) for entry in found.content] == [b"G", b"r", "ü".encode()[:1]]
    assert [entry.token for entry in found.content] == ["G", "r", "\ufffd"]
    assert [entry.logprob for entry in found.content[0].top_logprobs] == [-0.5, -1.5]


def test_logprobs_without_alternatives(talk: Talk) -> None:
    found = talk.chat(logprobs=True, max_tokens=1).choices[0].logprobs
    assert found.content[0].logprob == -0.5
    assert found.content[0].top_logprobs == []


def test_harmless_and_unknown_fields_are_ignored(talk: Talk) -> None:
    found = talk.chat(
        user="me",
        store=True,
        metadata={"a": "b"},
        service_tier="flex",
        extra_body={"never_heard_of": [1], "prediction": {"type": "content", "content": "x"}},
    )
    assert found.choices[0].message.content == ANSWER


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 257]}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"264": 1}}, "logit_bias"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"stop_token_ids": [264]}, "stop_token_ids"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"reasoning_effort": "most"}, "reasoning_effort"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_a_wrong_field_is_named(talk: Talk, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        talk.chat(extra_body=options)
    assert caught.value.param == param


def test_only_the_model_that_is_served_exists(talk: Talk) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.NotFoundError) as caught:
        talk.client.chat.completions.create(model="gpt-7", messages=messages)
    assert caught.value.code == "model_not_found"
    assert NAME in str(caught.value)


def test_the_models_own_files_have_the_defaults() -> None:
    model = named_model(temperature=0.6, top_p=0.95, top_k=20, do_sample=True)
    with talking(ANSWER, model=model) as talk:
        talk.chat(top_p=0.5)
        sampling = talk.sampling()
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.5, 20)


def test_a_model_that_does_not_sample_is_greedy_unless_told() -> None:
    with talking(ANSWER, model=named_model(do_sample=False, temperature=0.6)) as talk:
        talk.chat()
        assert talk.sampling().temperature == 0.0
        talk.chat(temperature=0.7)
        assert talk.sampling().temperature == 0.7


def test_limits_are_the_services() -> None:
    with talking(ANSWER, limits=Limits(choices=1, logprobs=3, stops=1)) as talk:
        for options in ({"n": 2}, {"stop": ["a", "b"]}, {"logprobs": True, "top_logprobs": 4}):
            with pytest.raises(openai.BadRequestError):
                talk.chat(**options)


def test_without_a_template_messages_are_joined() -> None:
    with talking(ANSWER, tokenizer=byte_tokenizer(None)) as talk:
        talk.chat(messages=[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
        assert talk.prompt() == "a\nb"
