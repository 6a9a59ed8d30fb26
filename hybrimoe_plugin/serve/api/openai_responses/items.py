"""The conversation and the tools of OpenAI's Responses, as chat templates take them."""

from __future__ import annotations

import json
from typing import Any

from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.api.shapes import object_at, objects_at, refuse, text_at, tool_at
from hybrimoe_plugin.serve.api.turns import Turns

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
        turns.text("system", text_at("instructions", body["instructions"]))
    told = body.get("input")
    if isinstance(told, str):
        turns.text("user", told)
        return turns.messages
    items = objects_at("input", told)
    if not items:
        raise ApiError(400, "input must not be empty", "input")
    for where, item in items:
        _add(turns, where, item)
    return turns.messages


def tools_of(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    """`tools` of a body, in the shape of chat completions.

    Raises:
        ApiError: one is malformed, or is a tool of OpenAI's own.
    """
    if body.get("tools") is None:
        return None
    tools = []
    for where, tool in objects_at("tools", body["tools"]):
        if tool.get("type") != "function":
            raise refuse(f"{where}.type", tool.get("type"))
        whole = {**tool, "parameters": tool.get("parameters") or {}}
        tools.append(tool_at(where, whole, "parameters"))
    return tools


def _add(turns: Turns, where: str, item: dict[str, Any]) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise ApiError(400, f"{where}.role must be one of {', '.join(_ROLES)}", f"{where}.role")
        turns.text(_ROLES[role], _text(f"{where}.content", item.get("content"), _TEXTS))
    elif kind == "function_call":
        turns.call(
            text_at(f"{where}.call_id", item.get("call_id")),
            text_at(f"{where}.name", item.get("name")),
            _arguments(f"{where}.arguments", item.get("arguments")),
        )
    elif kind == "function_call_output":
        call_id = text_at(f"{where}.call_id", item.get("call_id"))
        turns.result(call_id, _text(f"{where}.output", item.get("output"), _TEXTS))
    elif kind == "reasoning":
        # What comes from other servers may hold nothing that can be read here.
        thought = _text(f"{where}.content", item.get("content") or [], _THOUGHTS)
        if thought:
            turns.reasoning(thought)
    else:
        raise refuse(f"{where}.type", kind)


def _text(where: str, content: object, kinds: dict[str, str]) -> str:
    """Content that is text alone, in one string or in parts."""
    if isinstance(content, str):
        return content
    texts = []
    for at, part in objects_at(where, content):
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise refuse(f"{at}.type", kind)
        texts.append(text_at(f"{at}.{kinds[kind]}", part.get(kinds[kind])))
    return "\n".join(texts)


def _arguments(where: str, text: object) -> dict[str, Any]:
    try:
        return object_at(where, json.loads(text_at(where, text) or "{}"))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{where} must be a JSON object in a string", where) from error
