"""A conversation told in blocks or items, as the messages that chat templates take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrimoe_plugin.serve.api.checks import list_of, mapping, text
from hybrimoe_plugin.serve.api.errors import ApiError


@dataclass
class _Turn:
    role: str
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        found: dict[str, Any] = {"role": self.role, "content": _lines(self.texts), **self.about}
        if self.thoughts:
            # Templates know it by either name.
            found["reasoning_content"] = found["thinking"] = _lines(self.thoughts)
        if self.calls:
            found["tool_calls"] = self.calls
        return found


class Turns:
    """Gathers a conversation, oldest first.

    Templates expect one message for each turn, so neighbours of one role become one message, and
    an assistant's reasoning, text and tool calls become one.
    """

    def __init__(self) -> None:
        self._turns: list[_Turn] = []
        self._names: dict[str, str] = {}

    def messages(self) -> list[dict[str, Any]]:
        """As of `serve.text.prompts.Conversation`; pieces of a turn stand on lines of their own."""
        return [turn.message() for turn in self._turns]

    def text(self, role: str, text: str) -> None:
        """What somebody says."""
        self._turn(role).texts.append(text)

    def reasoning(self, text: str) -> None:
        """What the assistant thought. After its tool calls it begins another turn."""
        if self._turns and self._turns[-1].calls:
            self._turns.append(_Turn("assistant"))
        self._turn("assistant").thoughts.append(text)

    def call(self, call_id: str, name: str, arguments: dict[str, Any]) -> None:
        """A tool that the assistant calls."""
        self._names[call_id] = name
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self._turn("assistant").calls.append(call)

    def result(self, call_id: str, text: str) -> None:
        """What a tool answered. Templates that tell it by name find the name of its call."""
        about = {"tool_call_id": call_id}
        if call_id in self._names:
            about["name"] = self._names[call_id]
        self._turns.append(_Turn("tool", [text], about=about))

    def _turn(self, role: str) -> _Turn:
        if not self._turns or self._turns[-1].role != role:
            self._turns.append(_Turn(role))
        return self._turns[-1]


def _lines(pieces: list[str]) -> str:
    return "\n".join(filter(None, pieces))


def objects(where: str, value: object, fewest: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with where it stands.

    Raises:
        ApiError: it is not a list, has too few, or holds something else.
    """
    found = list_of(mapping, fewest)(where, value)
    return [(f"{where}[{at}]", one) for at, one in enumerate(found)]


def joined_text(where: str, content: object, kinds: Mapping[str, str]) -> str:
    """Content that is text alone, in one string or in parts, which stand on lines of their own.

    Args:
        kinds: type of a part -> the field that holds its text.

    Raises:
        ApiError: a part is of another type, or has the wrong form.
    """
    if isinstance(content, str):
        return content
    texts = []
    for at, part in objects(where, content):
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise unsupported(f"{at}.type", kind)
        texts.append(text(f"{at}.{kinds[kind]}", part.get(kinds[kind])))
    return "\n".join(texts)


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
