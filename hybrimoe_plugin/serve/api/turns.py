"""A conversation told in blocks or items, as the messages that chat templates take."""

from __future__ import annotations

from typing import Any


class Turns:
    """Gathers a conversation, oldest first.

    Templates expect one message for each turn, so neighbours of one role become one message, and
    an assistant's reasoning, text and tool calls become one.

    Attributes:
        messages: as transformers' chat templates take them; texts are plain strings.
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
        _add(self._turn("assistant"), "reasoning_content", text)

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
