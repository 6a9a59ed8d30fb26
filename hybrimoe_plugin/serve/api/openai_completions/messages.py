"""Messages and tools of a body, as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_plugin.serve.api.body import check_nesting
from hybrimoe_plugin.serve.api.checks import list_of, mapping, one_of, text, wrong
from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.text.tools import Tools

_ROLES = ("system", "developer", "user", "assistant", "tool")
_LONGEST_NAME = 256


def messages_of(value: Any) -> list[dict[str, Any]]:
    """The conversation. Contents become texts, arguments of tool calls objects.

    Raises:
        ApiError: it is empty, something in it has a wrong type, or is no text.
    """
    return [
        _message(f"messages[{at}]", one)
        for at, one in enumerate(list_of(mapping, fewest=1)("messages", value))
    ]


def _message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = one_of(*_ROLES)(f"{where}.role", message.get("role"))
    # Templates know the older name.
    found: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls") if role == "assistant" else None
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    found["content"] = _content(f"{where}.content", content)
    if calls:
        found["tool_calls"] = _calls(f"{where}.tool_calls", calls)
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            found[name] = text(f"{where}.{name}", message[name])
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if role == "assistant" and reasoning is not None:
        # By the names that templates use.
        told = text(f"{where}.reasoning_content", reasoning)
        found["reasoning_content"] = found["thinking"] = told
    if message.get("function_call") is not None:
        raise ApiError(400, f"{where}.function_call is not supported: use tool_calls", where)
    return found


def _content(where: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(where, "a string or a list of parts")
    return "\n".join(
        _part(f"{where}[{at}]", part) for at, part in enumerate(list_of(mapping)(where, value))
    )


def _part(where: str, part: Mapping[str, Any]) -> str:
    kind = text(f"{where}.type", part.get("type"))
    if kind in ("text", "refusal"):
        return text(f"{where}.{kind}", part.get(kind))
    raise ApiError(400, f"{where}: this model reads text alone, not {kind[:80]!r}", where)


def _calls(where: str, value: Any) -> list[dict[str, Any]]:
    found = []
    for at, call in enumerate(list_of(mapping)(where, value)):
        place = f"{where}[{at}]"
        function = mapping(f"{place}.function", call.get("function"))
        name = text(f"{place}.function.name", function.get("name"))
        arguments = _arguments(f"{place}.function.arguments", function.get("arguments"))
        told: dict[str, Any] = {
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        if call.get("id") is not None:
            told["id"] = text(f"{place}.id", call["id"])
        found.append(told)
    return found


def _arguments(where: str, value: Any) -> dict[str, Any]:
    """Templates go through them as an object; clients send the JSON that they were given."""
    try:
        parsed = json.loads(value or "{}") if isinstance(value, str) else value
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise wrong(where, "a JSON object, written as a string")
    check_nesting(parsed)
    return parsed


def tool_choice(name: str, value: Any) -> Any:
    """The check of the field; `tools_of` says what its string or object may be."""
    if not isinstance(value, str | dict):
        raise wrong(name, "a string or an object")
    return value


def tools_of(given: Mapping[str, Any]) -> Tools:
    """The tools of a body.

    Args:
        given: its fields `tools`, `tool_choice` and `parallel_tool_calls`.

    Raises:
        ApiError: one is wrong, or the choice names a tool that there is not.
    """
    functions = [
        _tool(f"tools[{at}]", tool)
        for at, tool in enumerate(list_of(mapping)("tools", given.get("tools", [])))
    ]
    parallel = given.get("parallel_tool_calls", True)
    choice = given.get("tool_choice", "auto")
    if isinstance(choice, str):
        one_of("auto", "none", "required")("tool_choice", choice)
        if choice == "required" and not functions:
            raise ApiError(
                400, "tool_choice requires a call, and there are no tools", "tool_choice"
            )
        return Tools(functions, choice, parallel)
    return Tools(functions, _named(choice, functions), parallel, named=True)


def _named(choice: Any, functions: Sequence[Mapping[str, Any]]) -> str:
    function = mapping("tool_choice", choice).get("function")
    name = text("tool_choice.function.name", mapping("tool_choice.function", function).get("name"))
    if all(name != one["function"]["name"] for one in functions):
        raise ApiError(400, f"tool_choice names {name[:80]!r}, which is no tool", "tool_choice")
    return name


def _tool(where: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    one_of("function")(f"{where}.type", tool.get("type", "function"))
    function = mapping(f"{where}.function", tool.get("function"))
    name = text(f"{where}.function.name", function.get("name"))
    if not 0 < len(name) <= _LONGEST_NAME:
        raise wrong(f"{where}.function.name", f"a string of 1 to {_LONGEST_NAME} characters")
    told: dict[str, Any] = {"name": name}
    if function.get("description") is not None:
        told["description"] = text(f"{where}.function.description", function["description"])
    told["parameters"] = mapping(f"{where}.function.parameters", function.get("parameters") or {})
    return {"type": "function", "function": told}
