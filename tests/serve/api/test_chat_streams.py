"""Streams say what whole answers say, and end when their client leaves, time is up or it fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai_server import NAME, Talk, talking, wait_until

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.serve.service import Limits

ANSWER = "<think>\nWhy? 🤔\n</think>\n\nGrüße, world. "


@pytest.fixture(scope="module")
def talk() -> Iterator[Talk]:
    with talking(ANSWER) as made:
        yield made


def joined(chunks: list[Any], choice: int = 0, name: str = "content") -> str:
    deltas = [c.choices[0].delta for c in chunks if c.choices and c.choices[0].index == choice]
    return "".join(getattr(delta, name, None) or "" for delta in deltas)


def reasons(chunks: list[Any], choice: int = 0) -> list[str]:
    found = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice]
    return [one.finish_reason for one in found if one.finish_reason is not None]


@pytest.mark.parametrize(
    "options", [{}, {"stop": "wor"}, {"max_tokens": 12}, {"max_tokens": 30}, {"stop": "</think>"}]
)
def test_a_stream_says_what_the_whole_answer_says(talk: Talk, options: dict[str, Any]) -> None:
    whole = talk.chat(**options).choices[0]
    chunks = list(talk.chat(stream=True, **options))
    assert joined(chunks) == whole.message.content
    assert joined(chunks, name="reasoning_content") == getattr(
        whole.message, "reasoning_content", ""
    )
    assert reasons(chunks) == [whole.finish_reason]
    assert chunks[0].choices[0].delta.role == "assistant"


def test_each_choice_has_its_stream(talk: Talk) -> None:
    chunks = list(talk.chat(stream=True, n=3))
    for choice in range(3):
        assert joined(chunks, choice) == "Grüße, world. "
        assert reasons(chunks, choice) == ["stop"]


def test_usage_comes_only_if_asked_for(talk: Talk) -> None:
    assert all(chunk.usage is None for chunk in talk.chat(stream=True))
    *others, last = talk.chat(stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in others)
    assert last.choices == []
    assert last.usage.completion_tokens == len(talk.service.tokenizer.encode(ANSWER))


def test_logprobs_of_a_stream_are_all_tokens(talk: Talk) -> None:
    chunks = list(talk.chat(stream=True, logprobs=True, top_logprobs=1))
    entries = [
        entry
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == ANSWER


def test_the_asynchronous_client_is_served() -> None:
    async def ask(talk: Talk) -> list[str]:
        messages: Any = [{"role": "user", "content": "hello"}]
        url = f"{talk.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:

            async def one() -> str:
                made = client.chat.completions
                stream = await made.create(model=NAME, messages=messages, stream=True)
                return joined([chunk async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(8)))

    with talking(ANSWER, seconds_per_token=0.001) as talk:
        assert asyncio.run(ask(talk)) == ["Grüße, world. "] * 8


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_ends_its_answers(streams: bool) -> None:
    with talking("a" * 10000, seconds_per_token=0.01) as talk:
        body = {"messages": [{"role": "user", "content": "x"}], "n": 2, "stream": streams}
        connection = talk.connection()
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        if streams:
            assert connection.getresponse().read(10)
        wait_until(lambda: len(talk.scheduler.requests) == 2)
        assert not any(ticket.cancelled.is_set() for ticket in talk.scheduler.tickets)
        connection.close()
        wait_until(lambda: all(ticket.cancelled.is_set() for ticket in talk.scheduler.tickets))


def test_an_answer_that_takes_too_long_ends() -> None:
    with talking("a" * 1000, seconds_per_token=0.05, limits=Limits(seconds=0.2)) as talk:
        with pytest.raises(openai.InternalServerError) as caught:
            talk.chat()
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="within 0.2 seconds"):
            list(talk.chat(stream=True))
        wait_until(lambda: all(ticket.cancelled.is_set() for ticket in talk.scheduler.tickets))


@pytest.mark.parametrize(
    ("error", "told"),
    [(HybriMoEError("no memory left"), "no memory left"), (KeyError("secret"), "KeyError")],
)
def test_a_failure_is_told(error: Exception, told: str) -> None:
    with talking("abc") as talk:
        talk.scheduler.error = error
        with pytest.raises(openai.InternalServerError, match=told):
            talk.chat()
        with pytest.raises(openai.APIError, match=told) as caught:
            list(talk.chat(stream=True))
        assert "secret" not in str(caught.value)


def test_text_before_a_failure_is_sent() -> None:
    with talking("abc") as talk:
        talk.scheduler.error = HybriMoEError("no memory left")
        chunks: list[Any] = []
        with pytest.raises(openai.APIError):
            chunks.extend(talk.chat(stream=True))
        assert joined(chunks) == "abc"
        assert reasons(chunks) == []


def test_a_full_queue_refuses_a_stream_by_its_status(talk: Talk) -> None:
    talk.scheduler.full = True
    try:
        with pytest.raises(openai.RateLimitError):
            talk.chat(stream=True)
    finally:
        talk.scheduler.full = False


@pytest.mark.parametrize("together", [True, False])
def test_clients_learn_whether_answers_are_computed_together(talk: Talk, together: bool) -> None:
    talk.scheduler.together = together
    messages: Any = [{"role": "user", "content": "hello"}]
    for streams in (False, True):
        raw: Any = talk.client.chat.completions.with_raw_response
        answer = raw.create(model=NAME, messages=messages, stream=streams)
        expected = "together" if together else "queued"
        assert answer.headers["x-hybrimoe-batching"] == expected
    talk.scheduler.together = True


def test_a_late_reader_gets_everything_at_once() -> None:
    with talking("x" * 500) as talk:
        stream = talk.chat(stream=True)
        first = next(stream)
        wait_until(lambda: not any(t.is_alive() for t in talk.scheduler.threads))
        chunks = [first, *stream]
        assert joined(chunks) == "x" * 500
