"""Streams of Messages, read by Anthropic's own client."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from more_apis_server import ADD, Served, serving
from openai_server import wait_until

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.serve.api.conversations import exchange
from hybrimoe_plugin.serve.service import Limits

ANSWER = "hello"
CACHED = 3


def _final(served: Served, **options: Any) -> Any:
    with served.anthropic.messages.stream(**served.asked(**options)) as stream:
        return stream.get_final_message()


def _plain(message: Any) -> dict[str, Any]:
    """A message without what differs from one answer to the next."""
    told: dict[str, Any] = message.model_dump()
    del told["id"]
    for block in told["content"]:
        for name in ("id", "parsed_output"):
            block.pop(name, None)
    return told


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": [ADD]},
        {"max_tokens": 30},
        {"stop_sequences": ["add"]},
        {"thinking": {"type": "enabled", "budget_tokens": 9999, "display": "omitted"}},
    ],
)
def test_a_stream_says_what_the_whole_answer_says(caller: Served, options: dict[str, Any]) -> None:
    assert _plain(_final(caller, **options)) == _plain(caller.message(**options))


def test_the_first_event_tells_the_prompts_tokens(served: Served) -> None:
    served.scheduler.cached_tokens = 5
    events: Any = list(served.anthropic.messages.create(**served.asked(), stream=True))
    usage = events[0].message.usage
    prompt = len(served.scheduler.requests[-1].prompt)
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (prompt - 5, 5)
    assert [event.type for event in events[-2:]] == ["message_delta", "message_stop"]
    assert events[-2].usage.output_tokens == 5


def test_events_are_named_as_they_are_typed(served: Served) -> None:
    _, text = served.send("/v1/messages", {**served.asked(), "stream": True})
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_quiet_connections_are_kept_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "QUIET_SECONDS", 0.01)
    with serving("ab", seconds_per_token=0.2) as served:
        _, text = served.send("/v1/messages", {**served.asked(), "stream": True})
        assert "event: ping" in text
        assert _final(served).content[0].text == "ab"


def test_a_failure_ends_the_stream_by_an_error(served: Served) -> None:
    served.scheduler.error = HybriMoEError("no memory left")
    with (
        served.anthropic.messages.stream(**served.asked()) as stream,
        pytest.raises(anthropic.APIStatusError, match="no memory left"),
    ):
        stream.get_final_message()


def test_an_answer_that_takes_too_long_ends_the_stream() -> None:
    limits = Limits(seconds=0.05)
    with serving("x" * 999, seconds_per_token=0.01, limits=limits) as served:
        with pytest.raises(anthropic.APIStatusError, match="not finished"):
            _final(served)
        wait_until(lambda: served.scheduler.tickets[-1].cancelled.is_set())


def test_a_full_queue_is_told_by_the_status(served: Served) -> None:
    served.scheduler.full = True
    with pytest.raises(anthropic.RateLimitError):
        _final(served)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(path: str, stream: bool) -> None:
    with serving("x" * 99999, seconds_per_token=0.01) as served:
        connection = served.connection()
        body = {**served.asked(), "input": "hello", "stream": stream}
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        if stream:
            connection.getresponse().read(10)
        wait_until(lambda: served.scheduler.requests)
        connection.close()
        wait_until(lambda: served.scheduler.tickets[-1].cancelled.is_set())
