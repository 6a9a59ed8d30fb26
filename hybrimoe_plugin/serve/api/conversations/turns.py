"""A conversation told in blocks or items, as the messages that chat templates take."""

from __future__ import annotations

from typing import Any

from hybrimoe_plugin.serve.api.checks import list_of, mapping, text
from hybrimoe_plugin.serve.api.errors import ApiError


class Turns:
    """Gathers a conversation, oldest first.

    Templates expect one message for each turn, so neighbours of one role become one message, and
    an assistant's reasoning, text and tool calls become one.

    Attributes:
        messages: as of `serve.text.prompts.Conversation`.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}

    def text(self, role: str, text: str) -> None:
        """What somebody says; pieces of one turn stand on lines of their own."""
        _add(self._turn(role), "content", text)

    def reasoning(self, text: str) -> None:
        """What the assistant thought. After its tool calls it begins another turn."""
        last = self.messages[-1] if self.messages else {}
        if "tool_calls" in last:
            self.messages.append({"role": "assistant", "content": ""})
        turn = self._turn("assistant")
        for name in ("reasoning_content", "thinking"):  # as templates call it
            _add(turn, name, text)

    def call(self, call_id: str, name: str, arguments: dict[str, Any]) -> None:
        """A tool that the assistant calls."""
        self._names[call_id] = name
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self._turn("assistant").setdefault("tool_calls", []).append(call)

    def result(self, call_id: str, text: str) -> None:
        """What a tool answered. Templates that tell it by name find the name of its call."""
        message = {"role": "tool", "tool_call_id": call_id, "content": text}
        if call_id in self._names:
            message["name"] = self._names[call_id]
        self.messages.append(message)

    def _turn(self, role: str) -> dict[str, Any]:
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": ""})
        return self.messages[-1]


def _add(message: dict[str, Any], key: str, text: str) -> None:
    before = message.get(key)
    message[key] = f"{before}\n{text}" if before else text


def objects(where: str, value: object, fewest: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with where it stands.

    Raises:
        ApiError: it is not a list, has too few, or holds something else.
    """
    found = list_of(mapping, fewest)(where, value)
    return [(f"{where}[{at}]", one) for at, one in enumerate(found)]


def tool(where: str, told: dict[str, Any], schema: str) -> dict[str, Any]:
    """A tool as OpenAI's chat completions write it; `schema` is its field of parameters.

    Raises:
        ApiError: a field of it has the wrong type.
    """
    function: dict[str, Any] = {"name": text(f"{where}.name", told.get("name"))}
    if told.get("description") is not None:
        function["description"] = text(f"{where}.description", told["description"])
    function["parameters"] = mapping(f"{where}.{schema}", told.get(schema))
    return {"type": "function", "function": function}


def unsupported(where: str, what: object) -> ApiError:
    """The error of something that would change the answer and that this server does not do."""
    return ApiError(400, f"{where}: {str(what)[:80]!r} is not supported by this server", where)
