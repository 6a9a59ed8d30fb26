"""What an answer's text consists of: content, reasoning, tool calls."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any, Protocol

log = logging.getLogger(__name__)

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names that response templates give it."""


@dataclass(frozen=True)
class Content:
    """More of the answer proper."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call, or more of its arguments.

    Attributes:
        index: of the call within the answer.
        name: of the function; None where the call has begun already.
        arguments: JSON, or the next part of it.
    """

    index: int
    name: str | None
    arguments: str


Part = Content | Reasoning | ToolCall


class Parts(Protocol):
    """Divides the text of one answer as it comes."""

    def feed(self, text: str) -> list[Part]:
        """The parts that this text makes certain."""

    def end(self) -> list[Part]:
        """What was held back."""


class Plain:
    """Everything is content."""

    def feed(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def end(self) -> list[Part]:
        return []


class NamedCall:
    """Everything is the arguments of one function, as a grammar sees to."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> list[Part]:
        if not text:
            return []
        name, self._name = self._name, None
        return [ToolCall(0, name, text)]

    def end(self) -> list[Part]:
        return []


class ListedCalls:
    """The text is a JSON list of calls, `name` and `arguments` each, as a grammar sees to."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, text: str) -> list[Part]:
        self._text += text
        return []

    def end(self) -> list[Part]:
        try:
            calls = json.loads(self._text)
            return [
                ToolCall(index, str(call["name"]), json.dumps(call["arguments"]))
                for index, call in enumerate(calls)
            ]
        except (ValueError, TypeError, KeyError, RecursionError):
            # Cut off by the token limit.
            return [Content(self._text)] if self._text else []


class Marked:
    """Divides by a model's own signs, through transformers' `ResponseParser`.

    White space around a sign belongs to the sign. Where a tool call cannot be read, its text and
    all that follows is content: nothing is lost.

    Args:
        parser: which has read the prompt.
        held: the end of the prompt that it has not told yet, and that is no part of the answer.
        most_calls: later ones are left out.
    """

    def __init__(self, parser: Any, held: str = "", most_calls: int | None = None) -> None:
        self._parser: Any = parser
        self._held = held
        self._most_calls = most_calls
        self._calls = 0
        self._field: str | None = None
        """What the last text belonged to."""
        self._at_sign = False
        """Whether a sign is all that came before what comes next."""
        self._space = ""
        """At the text's end, and held back: a sign may follow."""
        self._raw = ""
        """Text behind the last part."""

    def feed(self, text: str) -> list[Part]:
        if self._parser is None:
            return Plain().feed(text)
        self._raw += text
        try:
            events = self._parser.feed(text)
        except Exception as error:  # the model, and the client's schemas, may write anything
            return self._give_up(error)
        return self._parts(events)

    def end(self) -> list[Part]:
        if self._parser is None:
            return []
        try:
            _, events = self._parser.finalize()
        except Exception as error:
            return self._give_up(error)
        found = self._parts(events)
        if self._space and self._field not in _REASONING:
            found.append(Content(self._space))
        return found

    def _give_up(self, error: Exception) -> list[Part]:
        log.info("an answer cannot be divided any further: %s", str(error)[:200])
        self._parser = None
        return Plain().feed(self._space + self._raw)

    def _parts(self, events: list[dict[str, Any]]) -> list[Part]:
        found: list[Part] = []
        for event in events:
            field = event["field"]
            if field == "tool_calls":
                if event["type"] == "region_close":
                    self._raw = ""
                    self._change("tool_calls")
                    found += self._call(event["value"])
            elif event["type"] == "region_chunk":
                found += self._text(field, event["text"])
        return found

    def _text(self, field: str, text: str) -> list[Part]:
        text = self._without_held(text)
        if not text:
            return []
        _, _, self._raw = self._raw.partition(text)
        if field != self._field:
            self._change(field)
        text = self._space + text
        if self._at_sign:
            text = text.lstrip()
            self._at_sign = not text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if not kept:
            return []
        return [Reasoning(kept) if field in _REASONING else Content(kept)]

    def _without_held(self, text: str) -> str:
        held, self._held = self._held, ""
        if held.startswith(text):
            self._held = held[len(text) :]
            return ""
        return text.removeprefix(held)

    def _change(self, field: str) -> None:
        self._at_sign = self._field is not None or field in _REASONING
        self._field, self._space = field, ""

    def _call(self, value: Any) -> list[Part]:
        try:
            name, arguments = str(value["function"]["name"]), value["function"]["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            f"{name}{arguments}".encode()  # models may write halves of characters too
        except (TypeError, KeyError, ValueError):
            return [Content(value if isinstance(value, str) else json.dumps(value))]
        self._calls += 1
        if self._most_calls is not None and self._calls > self._most_calls:
            return []
        return [ToolCall(self._calls - 1, name, arguments)]
