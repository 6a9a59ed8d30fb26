"""Conversations become messages that chat templates take."""

from __future__ import annotations

from typing import Any

import pytest

from hybrimoe_plugin.serve.api.anthropic import conversation
from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.api.openai_responses import items

DEEP = "[" * 9999
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WHOLE = [
    {"role": "system", "content": "Be kind.\nBe short."},
    {"role": "user", "content": "What is 1 + 1?"},
    {
        "role": "assistant",
        "content": "Let me add.",
        "reasoning_content": "A sum.",
        "thinking": "A sum.",
        "tool_calls": [CALL],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "2", "name": "add"},
    {"role": "user", "content": "And?"},
]
"""What both APIs' conversations below become."""


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _said(content: Any, role: Any = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


def test_a_conversation_of_messages() -> None:
    body = {
        "system": [_text("Be kind."), {**_text("Be short."), "cache_control": {"type": "x"}}],
        "messages": [
            {"role": "user", "content": "What is 1 + 1?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "A sum.", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    _text("Let me add."),
                    {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": [_text("2")]},
                    _text("And?"),
                ],
            },
        ],
    }
    assert conversation.messages_of(body) == WHOLE


def test_a_conversation_of_items() -> None:
    body = {
        "instructions": "Be kind.",
        "input": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "input_text", "text": "What is 1 + 1?"}]},
            {
                "type": "reasoning",
                "id": "rs",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "A sum."}],
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Let me add.", "annotations": []}],
            },
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "2"},
            {"role": "user", "content": "And?"},
        ],
    }
    assert items.messages_of(body) == WHOLE


def test_a_plain_string_is_one_message() -> None:
    assert items.messages_of({"input": "Hi"}) == [{"role": "user", "content": "Hi"}]


def test_a_tool_that_failed_says_so() -> None:
    block = {"type": "tool_result", "tool_use_id": "c1", "content": "no", "is_error": True}
    (message,) = conversation.messages_of({"messages": [{"role": "user", "content": [block]}]})
    assert message == {"role": "tool", "tool_call_id": "c1", "content": "Error: no"}


def test_reasoning_after_calls_begins_a_turn() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": ""}
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "So."}]}
    first, second = items.messages_of({"input": [call, thought]})
    assert "tool_calls" in first
    assert second == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "So.",
        "thinking": "So.",
    }


def test_reasoning_that_nobody_can_read_is_left_out() -> None:
    sealed = {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "x"}
    user = {"role": "user", "content": "Hi"}
    assert items.messages_of({"input": [sealed, user]}) == [user]


def test_tools_of_both_apis_become_the_same() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    about = {"name": "add", "description": "Adds."}
    one = conversation.tools_of({"tools": [{**about, "input_schema": schema}]})
    other = items.tools_of({"tools": [{**about, "type": "function", "parameters": schema}]})
    assert one == other == [{"type": "function", "function": {**about, "parameters": schema}}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        (_said("x", role=["user"]), "messages[0].role"),
        (_said(None), "messages[0].content"),
        (_said([{"type": "image"}]), "messages[0].content[0]"),
        (_said([{"type": []}]), "messages[0].content[0]"),
        (_said([{"type": "text"}]), "messages[0].content[0]"),
        (_said([{"type": "tool_use", "id": "c", "name": "n"}], "assistant"), "messages[0]"),
        ({"system": [{"type": "image"}], "messages": []}, "system[0]"),
        ({"system": 3, "messages": []}, "system"),
    ],
)
def test_malformed_messages_are_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        conversation.messages_of(body)
    assert refused.value.status == 400
    assert (refused.value.param or "").startswith(param)


@pytest.mark.parametrize(
    ("told", "param"),
    [
        (None, "input"),
        ([], "input"),
        ([None], "input[0]"),
        ([{"type": "item_reference", "id": "x"}], "input[0].type"),
        ([{"type": {}, "id": "x"}], "input[0].type"),
        ([{"role": "judge", "content": "x"}], "input[0].role"),
        ([{"role": {}, "content": "x"}], "input[0].role"),
        ([{"role": "user", "content": [{"type": "input_image"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": []}]}], "input[0].content[0]"),
        ([{"type": "function_call", "call_id": "c", "name": "n", "arguments": "{"}], "input[0]"),
        (
            [{"type": "function_call", "call_id": "c", "name": "n", "arguments": "[" * 9999}],
            "input",
        ),
        ([{"type": "function_call_output", "output": "2"}], "input[0].call_id"),
    ],
)
def test_malformed_items_are_refused_by_name(told: object, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        items.messages_of({"input": told})
    assert refused.value.status == 400
    assert (refused.value.param or "").startswith(param)


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": [], "name": "x"},
        {"name": "x"},
        {"name": 3, "input_schema": {}},
        {"name": "x", "input_schema": {}, "description": []},
        "x",
    ],
)
def test_other_tools_are_refused(tool: object) -> None:
    for of in (conversation.tools_of, items.tools_of):
        with pytest.raises(ApiError):
            of({"tools": [tool]})
