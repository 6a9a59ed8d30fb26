"""Completions, asked for by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai_server import Talk, talking, wait_until

ANSWER = "<think>Grüße, world!!!"


@pytest.fixture(scope="module")
def talk() -> Iterator[Talk]:
    with talking(ANSWER) as made:
        yield made


def texts(chunks: Any, count: int) -> list[str]:
    found = [""] * count
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index] += choice.text
    return found


def test_a_text_is_continued_as_it_is(talk: Talk) -> None:
    found = talk.complete("a b", max_tokens=100)
    assert talk.prompt() == "a b"
    assert (found.choices[0].text, found.choices[0].finish_reason) == (ANSWER, "stop")


def test_the_limit_is_openais_where_none_is_given(talk: Talk) -> None:
    found = talk.complete()
    assert found.usage.completion_tokens == 16
    assert found.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([65, 66], ["bc"]),
        ([[65], [66, 67]], ["b", "cd"]),
    ],
)
def test_every_form_of_prompts(talk: Talk, prompt: Any, prompts: list[str]) -> None:
    before = len(talk.scheduler.requests)
    found = talk.complete(prompt, max_tokens=3, n=2)
    ids = [request.prompt for request in talk.scheduler.requests[before:]]
    decoded = [talk.service.tokenizer.decode(one) for one in ids]
    assert decoded == [one for one in prompts for _ in range(2)]
    assert [choice.index for choice in found.choices] == list(range(2 * len(prompts)))
    assert found.usage.prompt_tokens == sum(map(len, prompts))
    assert found.usage.completion_tokens == 3 * 2 * len(prompts)


@pytest.mark.parametrize("prompt", [["ab", "c"], [[65, 66], [67]]])
def test_echo_puts_the_prompt_before_the_answer(talk: Talk, prompt: Any) -> None:
    options: Any = {"echo": True, "max_tokens": 100}
    whole = [choice.text for choice in talk.complete(prompt, **options).choices]
    streamed = texts(talk.complete(prompt, stream=True, **options), 2)
    expected = ["ab", "c"] if isinstance(prompt[0], str) else ["bc", "d"]
    assert whole == streamed == [text + ANSWER for text in expected]


def test_logprobs_are_lists_side_by_side(talk: Talk) -> None:
    found = talk.complete(logprobs=2, max_tokens=3).choices[0].logprobs
    assert found.tokens == ["<think>", "G", "r"]
    assert found.token_logprobs == [-0.5] * 3
    assert found.text_offset == [0, 7, 8]
    assert list(found.top_logprobs[1].values()) == [-0.5, -1.5]


def test_offsets_go_on_through_a_stream(talk: Talk) -> None:
    offsets: list[int] = []
    for chunk in talk.complete(logprobs=0, max_tokens=3, stream=True):
        for choice in chunk.choices:
            offsets += choice.logprobs.text_offset
    assert offsets == [0, 7, 8]


def test_a_stream_ends_with_a_reason_and_usage_if_asked(talk: Talk) -> None:
    *_, last = talk.complete(stream=True)
    assert last.choices[0].finish_reason == "length"
    *_, last = talk.complete(stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens == 16


def test_a_stop_string_ends_it(talk: Talk) -> None:
    found = talk.complete(stop=", ", max_tokens=100).choices[0]
    assert (found.text, found.finish_reason) == ("<think>Grüße", "stop")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_what_is_not_supported_is_named(talk: Talk, options: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        talk.complete(**options)
    assert caught.value.param == param


def test_what_changes_nothing_is_accepted(talk: Talk) -> None:
    assert talk.complete(suffix="", best_of=2, n=2).choices[1].text


def test_several_prompts_end_together_when_the_client_leaves() -> None:
    with talking("a" * 10000, seconds_per_token=0.01) as talk:
        connection = talk.connection()
        body = json.dumps({"prompt": ["a", "b", "c"], "max_tokens": 9000})
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        wait_until(lambda: len(talk.scheduler.requests) == 3)
        connection.close()
        wait_until(lambda: all(ticket.cancelled.is_set() for ticket in talk.scheduler.tickets))
