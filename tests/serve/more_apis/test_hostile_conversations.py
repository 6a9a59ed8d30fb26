"""Whatever a body of Messages or Responses holds, it is the client's fault and told quickly."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from more_apis_server import ADD, ADD_FUNCTION, Served, serving

from hybrimoe_plugin.serve.text import grammars

PATHS = ("/v1/messages", "/v1/messages/count_tokens", "/v1/responses")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch, serving("ok") as made:
        patch.setattr(grammars, "_compile", lambda *_: None)
        yield made


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b"[" * 99999,
        b'{"max_tokens": NaN}',
        b'{"system": "\\ud800", "input": "\\ud800"}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_request_is_refused(served: Served, path: str, body: bytes) -> None:
    before = len(served.scheduler.requests)
    begun = time.monotonic()
    status, text = served.send(path, body)
    assert status == 400, text
    assert time.monotonic() - begun < 5
    error = json.loads(text)
    assert error["error"]["type"] == "invalid_request_error"
    assert (error.get("type") == "error") is path.startswith("/v1/messages")
    assert len(served.scheduler.requests) == before


def test_arguments_may_not_hold_halves_of_characters(served: Served) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "n", "arguments": '{"a": "\\ud800"}'}
    assert served.send("/v1/responses", {"input": [call]})[0] == 400


def test_a_template_that_refuses_is_told(served: Served) -> None:
    body = {**served.asked(), "chat_template_kwargs": {"messages": []}}
    status, text = served.send("/v1/messages", body)
    assert (status, "chat_template_kwargs.messages" in text) == (400, True)


_KINDS = (
    *("text", "tool_use", "tool_result", "thinking", "image", "input_text", "message"),
    *("reasoning", "function_call", "function_call_output", "function", "enabled", "auto", "any"),
    *("tool", "json_schema", "user", "assistant", "system", "none", "low"),
)
_NAMES = (
    *("type", "role", "content", "text", "id", "name", "input", "tool_use_id", "call_id"),
    *("output", "arguments", "thinking", "summary", "is_error", "input_schema", "parameters"),
    *("format", "schema", "effort", "display", "include_usage"),
)
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(_KINDS)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
_FIELDS = (
    *("messages", "system", "max_tokens", "stop_sequences", "tools", "tool_choice", "thinking"),
    *("output_config", "input", "instructions", "max_output_tokens", "text", "reasoning"),
    *("include", "top_logprobs", "parallel_tool_calls", "metadata", "temperature", "top_k"),
    *("chat_template_kwargs", "model", "stop", "user", "stream_options", "container"),
)


@settings(max_examples=100)
@given(
    changed=st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=3),
    path=st.sampled_from(PATHS),
)
def test_no_body_fails_the_server(served: Served, changed: dict[str, Any], path: str) -> None:
    tools = [ADD_FUNCTION] if path == PATHS[2] else [ADD]
    body = {**served.asked(), "input": "hello", "tools": tools, **changed}
    status, text = served.send(path, body)
    assert status in (200, 400, 404), (body, text)
    json.loads(text)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("add", '{"a": "\\ud800"}'), ("add", '{"a": NaN}'), ("a\\ud800", "{}"), ("add", "[")],
)
def test_calls_that_json_cannot_write_are_text(name: str, arguments: str) -> None:
    call = f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    with serving(call) as served:
        assert [block.type for block in served.message(tools=[ADD]).content] == ["text"]
        assert [item.type for item in served.respond(tools=[ADD_FUNCTION]).output] == ["message"]
