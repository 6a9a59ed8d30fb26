"""Streams of Responses, read by OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from more_apis_server import ADD_FUNCTION, Served, serving
from openai_server import NAME

from hybrimoe_plugin.errors import HybriMoEError

ANSWER = "hello"
CACHED = 3


def _events(served: Served, **options: Any) -> list[Any]:
    """What the client's own reader makes of the events, which checks their order."""
    with served.client.responses.stream(model=NAME, input="hello", **options) as stream:
        return list(stream)


def _plain(response: Any) -> dict[str, Any]:
    """A response without what differs from one answer to the next."""
    told: dict[str, Any] = response.to_dict()
    for name in ("id", "created_at", "completed_at"):
        del told[name]
    for item in told["output"]:
        for name in ("id", "call_id", "parsed_arguments"):
            item.pop(name, None)
        for part in item.get("content", []):
            part.pop("parsed", None)
    return told


@pytest.mark.parametrize(
    "options",
    [{}, {"tools": [ADD_FUNCTION]}, {"top_logprobs": 1, "temperature": 0.5}],
)
def test_a_stream_says_what_the_whole_answer_says(caller: Served, options: dict[str, Any]) -> None:
    events = _events(caller, **options)
    assert events[-1].type == "response.completed"
    assert _plain(events[-1].response) == _plain(caller.respond(**options))


def test_events_are_numbered_and_in_order() -> None:
    with serving("<think>\nA sum.\n</think>\n\nTwo.") as served:
        events: Any = list(served.client.responses.create(model=NAME, input="x", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    assert list(dict.fromkeys(types)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.completed",
    ]


def test_pieces_make_up_the_whole(caller: Served) -> None:
    events = _events(caller, tools=[ADD_FUNCTION])
    for kind, whole in (
        ("response.reasoning_text.delta", "A sum."),
        ("response.output_text.delta", "Let me add."),
        ("response.function_call_arguments.delta", '{"a": 1, "b": "ü"}'),
    ):
        assert "".join(event.delta for event in events if event.type == kind) == whole


def test_an_answer_that_was_cut_off_is_incomplete(served: Served) -> None:
    last = _events(served, max_output_tokens=2)[-1]
    assert last.type == "response.incomplete"
    assert last.response.output[0].content[0].text == "he"


def test_a_failure_ends_the_stream(served: Served) -> None:
    served.scheduler.error = HybriMoEError("no memory left")
    last = _events(served)[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.message == "no memory left"
    assert last.response.output[0].content[0].text == "hello"


def test_a_full_queue_is_told_by_the_status(served: Served) -> None:
    served.scheduler.full = True
    with pytest.raises(openai.RateLimitError):
        _events(served)
