"""One answer as Anthropic's Messages tell it, whole and in events."""

from __future__ import annotations

import uuid
from typing import Any

from hybrimoe_plugin.serve.api.anthropic.blocks import Blocks
from hybrimoe_plugin.serve.api.conversations.counts import Counts
from hybrimoe_plugin.serve.api.conversations.exchange import Event
from hybrimoe_plugin.serve.api.errors import ApiError, anthropic_body
from hybrimoe_plugin.serve.requests import End, Reason
from hybrimoe_plugin.serve.text.asking import Delta
from hybrimoe_plugin.serve.text.parts import Content, Part, Reasoning


class Message:
    """A `Telling` of one answer.

    Args:
        model: its name.
        prompt: tokens of it.
        max_tokens: that the answer may have.
        shows_thinking: whether clients get what the model thinks, or blocks without it.
    """

    def __init__(self, model: str, prompt: int, max_tokens: int, shows_thinking: bool) -> None:
        self.counts = Counts(prompt)
        self._model = model
        self._max_tokens = max_tokens
        self._shows_thinking = shows_thinking
        self._id = f"msg_{uuid.uuid4().hex}"
        self._blocks = Blocks()
        self._has_begun = False
        self._stop: str | None = None
        self._reason: str | None = None

    def take(self, delta: Delta) -> list[Event]:
        """The events of what is new."""
        self.counts.add(delta)
        self._stop = delta.stop or self._stop
        events = []
        if not self._has_begun:
            self._has_begun = True
            events.append({"type": "message_start", "message": self.whole()})
        for part in delta.parts:
            events += self._part(part)
        if delta.end is not None:
            events += [*self._blocks.close(), *self._end(delta.end)]
        return events

    def quiet(self) -> list[Event]:
        """What keeps a connection open."""
        return [{"type": "ping"}]

    def failed(self, error: ApiError) -> list[Event]:
        """The event of an answer that ends by an error."""
        return [anthropic_body(error)]

    def whole(self) -> dict[str, Any]:
        """The message, as far as it is complete."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": list(self._blocks.content),
            "stop_reason": self._reason,
            "stop_sequence": self._stop,
            "usage": self._usage(),
        }

    def _part(self, part: Part) -> list[Event]:
        if isinstance(part, Content):
            return self._blocks.text(part.text)
        if isinstance(part, Reasoning):
            return self._blocks.thinking(part.text, self._shows_thinking)
        events = []
        if part.name is not None:
            events += self._blocks.tool_use(f"toolu_{uuid.uuid4().hex}", part.name)
        return events + self._blocks.arguments(part.arguments)

    def _end(self, end: End) -> list[Event]:
        self._reason = self._stop_reason(end)
        delta = {"stop_reason": self._reason, "stop_sequence": self._stop}
        return [
            {"type": "message_delta", "delta": delta, "usage": self._usage()},
            {"type": "message_stop"},
        ]

    def _stop_reason(self, end: End) -> str:
        if self._stop is not None:
            return "stop_sequence"
        if end.reason is Reason.LENGTH:
            is_full = end.tokens < self._max_tokens
            return "model_context_window_exceeded" if is_full else "max_tokens"
        calls = any(block["type"] == "tool_use" for block in self._blocks.content)
        return "tool_use" if calls else "end_turn"

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts cached tokens apart from the others of the prompt."""
        counts = self.counts
        return {
            "input_tokens": counts.prompt - counts.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": counts.cached,
            "output_tokens": counts.answer,
            "output_tokens_details": {"thinking_tokens": counts.reasoning},
        }
