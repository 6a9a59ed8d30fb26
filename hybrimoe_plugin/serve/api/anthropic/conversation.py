"""The conversation and the tools of Anthropic's Messages, as chat templates take them."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.serve.api.checks import mapping, one_of, text
from hybrimoe_plugin.serve.api.conversations.turns import (
    Turns,
    joined_text,
    objects,
    tool,
    unsupported,
)

_ROLES = ("user", "assistant", "system")
_TEXTS = {"text": "text"}
"""Type of a block -> the field that holds its text."""


def messages_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """`system` and `messages` of a body.

    Raises:
        ApiError: something in them is malformed, or is not text.
    """
    turns = Turns()
    system = body.get("system")
    if system is not None and system != "":
        turns.text("system", joined_text("system", system, _TEXTS))
    for where, message in objects("messages", body.get("messages"), fewest=1):
        role = one_of(*_ROLES)(f"{where}.role", message.get("role"))
        _add(turns, role, f"{where}.content", message.get("content"))
    return turns.messages()


def tools_of(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    """`tools` of a body, in OpenAI's shape.

    Raises:
        ApiError: one is malformed, or is a tool of Anthropic's own.
    """
    if body.get("tools") is None:
        return None
    tools = []
    for where, told in objects("tools", body["tools"]):
        if told.get("type") not in (None, "custom"):
            raise unsupported(f"{where}.type", told["type"])
        tools.append(tool(where, told, "input_schema"))
    return tools


def _add(turns: Turns, role: str, where: str, content: object) -> None:
    if isinstance(content, str):
        turns.text(role, content)
        return
    for at, block in objects(where, content):
        kind = block.get("type")
        if kind == "text":
            turns.text(role, text(f"{at}.text", block.get("text")))
        elif kind == "tool_result" and role == "user":
            call_id = text(f"{at}.tool_use_id", block.get("tool_use_id"))
            found = joined_text(f"{at}.content", block.get("content", ""), _TEXTS)
            turns.result(call_id, f"Error: {found}" if block.get("is_error") is True else found)
        elif kind == "tool_use" and role == "assistant":
            turns.call(
                text(f"{at}.id", block.get("id")),
                text(f"{at}.name", block.get("name")),
                mapping(f"{at}.input", block.get("input")),
            )
        elif kind == "thinking" and role == "assistant":
            turns.reasoning(text(f"{at}.thinking", block.get("thinking")))
        elif kind != "redacted_thinking" or role != "assistant":  # which nobody here can read
            raise unsupported(f"{at}.type", kind)
