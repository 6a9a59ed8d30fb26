"""Whatever a body holds, its sender is told quickly, in OpenAI's form, and nothing is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_server import Talk, talking

from hybrimoe_plugin.serve.text import grammars

PATHS = ("/v1/chat/completions", "/v1/completions")
USER = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def talk() -> Iterator[Talk]:
    with pytest.MonkeyPatch.context() as patch, talking("ok") as made:
        patch.setattr(grammars, "_compile", lambda *_: None)
        yield made


def refused(talk: Talk, path: str, body: bytes) -> dict[str, Any]:
    """The error; the test fails if there is none."""
    before = len(talk.scheduler.requests)
    status, found = talk.post(path, body)
    assert status == 400, found
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert found["error"]["type"] == "invalid_request_error"
    assert len(talk.scheduler.requests) == before
    error: dict[str, Any] = found["error"]
    return error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b"\xff\xfe\x00",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"x":' * 100_000,
        b'{"metadata": ' + b'{"a":' * 200 + b"1" + b"}" * 201,
        b'{"user": "\\ud800"}',
        b'{"model": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"model": 5}',
        b'{"model": ["org/some-model"]}',
        b"{}",
    ],
)
def test_a_body_that_is_no_request(talk: Talk, path: str, body: bytes) -> None:
    refused(talk, path, body)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hello", "messages"),
        ([], "messages"),
        ([1], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": 7, "content": "x"}], "messages[0].role"),
        ([{"role": "function", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0]",
        ),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
            "messages[0].content[0]",
        ),
        ([USER, {"role": "assistant", "tool_calls": "x"}], "messages[1].tool_calls"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls[0].function"),
        ([USER, {"role": "tool", "tool_call_id": 3, "content": "x"}], "messages[1].tool_call_id"),
    ],
)
def test_messages_that_are_none(talk: Talk, messages: Any, param: str) -> None:
    error = refused(talk, PATHS[0], json.dumps({"messages": messages}).encode())
    assert error["param"] == param


@pytest.mark.parametrize("arguments", ["{", "[]", "3", '"x"', '{"a": NaN}', '{"a": "\\ud800"}', 7])
def test_arguments_of_a_call_that_are_no_object(talk: Talk, arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, USER]
    error = refused(talk, PATHS[0], json.dumps({"messages": messages}).encode())
    assert error["param"] == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    "tools",
    [
        "x",
        [1],
        [{"type": "web_search"}],
        [{"type": "function"}],
        [{"type": "function", "function": {"name": ""}}],
        [{"type": "function", "function": {"name": "f", "parameters": "x"}}],
        [{"type": "function", "function": {"name": "f", "description": 1}}],
    ],
)
def test_tools_that_are_none(talk: Talk, tools: Any) -> None:
    error = refused(talk, PATHS[0], json.dumps({"messages": [USER], "tools": tools}).encode())
    assert error["param"].startswith("tools")


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        ("", "prompt"),
        ([], "prompt"),
        ([[]], "prompt[0]"),
        ([1, "x"], "prompt[1]"),
        (["x", 1], "prompt[1]"),
        ([1.5], "prompt[0]"),
        ([-1], "prompt[0]"),
        ([264], "prompt"),
        ([10**30], "prompt[0]"),
        ({"a": 1}, "prompt"),
        (["x"] * 129, "prompt"),
    ],
)
def test_prompts_that_are_none(talk: Talk, prompt: Any, param: str) -> None:
    error = refused(talk, PATHS[1], json.dumps({"prompt": prompt}).encode())
    assert error["param"] == param


def test_a_schema_that_makes_no_sense_does_not_break_a_call() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "1"}}\n</tool_call>'
    parameters = {"type": "object", "properties": {"a": {"anyOf": 5}}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with talking(call) as talk:
        message = talk.chat(tools=[tool]).choices[0].message
    # transformers cannot read such a schema: the text of the call is not lost.
    assert '{"name": "f"' in message.content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = (
    *("messages", "tools", "tool_choice", "stop", "n", "logit_bias", "response_format", "prompt"),
    *("stream_options", "chat_template_kwargs", "structured_outputs", "logprobs", "top_logprobs"),
    *("guided_json", "guided_choice", "stop_token_ids", "seed", "max_tokens", "echo", "model"),
)


@settings(max_examples=150)
@given(
    body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    has_prompt=st.booleans(),
    path=st.sampled_from(PATHS),
)
def test_no_value_of_a_field_is_the_servers_fault(
    talk: Talk, body: dict[str, Any], has_prompt: bool, path: str
) -> None:
    if has_prompt:
        body = {**body, "messages": [USER], "prompt": "x"}
    status, found = talk.post(path, json.dumps(body).encode())
    assert status in (200, 400, 404), (body, found)
