"""The conversation and the tools of OpenAI's Responses, as chat templates take them."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.serve.api.body import parse
from hybrimoe_plugin.serve.api.checks import one_of, text, wrong
from hybrimoe_plugin.serve.api.conversations.turns import (
    Turns,
    joined_text,
    objects,
    tool,
    unsupported,
)
from hybrimoe_plugin.serve.api.errors import ApiError

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXTS = {"input_text": "text", "output_text": "text", "refusal": "refusal", "text": "text"}
"""Type of a part of a message -> the field that holds its text."""
_THOUGHTS = {"reasoning_text": "text"}


def messages_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """`instructions` and `input` of a body.

    Raises:
        ApiError: something in them is malformed, or is not text.
    """
    turns = Turns()
    if body.get("instructions") is not None:
        turns.text("system", text("instructions", body["instructions"]))
    told = body.get("input")
    if isinstance(told, str):
        turns.text("user", told)
        return turns.messages()
    for where, item in objects("input", told, fewest=1):
        _add(turns, where, item)
    return turns.messages()


def tools_of(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    """`tools` of a body, in the shape of chat completions.

    Raises:
        ApiError: one is malformed, or is a tool of OpenAI's own.
    """
    if body.get("tools") is None:
        return None
    tools = []
    for where, told in objects("tools", body["tools"]):
        if told.get("type") != "function":
            raise unsupported(f"{where}.type", told.get("type"))
        whole = {**told, "parameters": told.get("parameters") or {}}
        tools.append(tool(where, whole, "parameters"))
    return tools


def _add(turns: Turns, where: str, item: dict[str, Any]) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        role = one_of(*_ROLES)(f"{where}.role", item.get("role"))
        turns.text(_ROLES[role], joined_text(f"{where}.content", item.get("content"), _TEXTS))
    elif kind == "function_call":
        turns.call(
            text(f"{where}.call_id", item.get("call_id")),
            text(f"{where}.name", item.get("name")),
            _arguments(f"{where}.arguments", item.get("arguments")),
        )
    elif kind == "function_call_output":
        call_id = text(f"{where}.call_id", item.get("call_id"))
        turns.result(call_id, joined_text(f"{where}.output", item.get("output"), _TEXTS))
    elif kind == "reasoning":
        # What comes from other servers may hold nothing that can be read here.
        thought = joined_text(f"{where}.content", item.get("content") or [], _THOUGHTS)
        if thought:
            turns.reasoning(thought)
    else:
        raise unsupported(f"{where}.type", kind)


def _arguments(where: str, value: object) -> dict[str, Any]:
    """Templates go through them as an object; clients send the JSON that they were given."""
    try:
        return parse((text(where, value) or "{}").encode())
    except ApiError as error:
        raise wrong(where, "a JSON object, written as a string") from error
