"""One answer as OpenAI's Responses tell it, whole and in events."""

from __future__ import annotations

import time
import uuid
from typing import Any

from hybrimoe_plugin.serve.api.conversations.counts import Counts
from hybrimoe_plugin.serve.api.conversations.exchange import Event
from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.api.openai_completions.told import chat_logprobs
from hybrimoe_plugin.serve.api.openai_responses.envelope import usage_of
from hybrimoe_plugin.serve.api.openai_responses.output import Output
from hybrimoe_plugin.serve.requests import End, Reason, Token
from hybrimoe_plugin.serve.text.asking import Delta
from hybrimoe_plugin.serve.text.parts import Content, Part, Reasoning
from hybrimoe_plugin.serve.text.spelling import Spelling


class Response:
    """A `Telling` of one answer.

    Args:
        begun: the response's envelope.
        prompt: tokens of it.
        spelling: to tell log-probabilities; None where they are not asked for.
    """

    def __init__(self, begun: dict[str, Any], prompt: int, spelling: Spelling | None) -> None:
        self.counts = Counts(prompt)
        self._told = begun
        self._spelling = spelling
        self._output = Output(uuid.uuid4().hex)
        self._has_begun = False
        self._number = 0
        self._untold: list[Token] = []
        """Tokens whose text has not come yet."""

    def take(self, delta: Delta) -> list[Event]:
        """The events of what is new."""
        self.counts.add(delta)
        events = self._begin()
        for token, parts in delta.steps:
            if token is not None:
                self._untold.append(token)
            for part in parts:
                events += self._part(part)
        if delta.end is not None:
            events += self._end(delta.end)
        return self._numbered(events)

    def quiet(self) -> list[Event]:
        """Nothing: this API has no event for it."""
        return []

    def failed(self, error: ApiError) -> list[Event]:
        """The events of an answer that ends by an error."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        events = [*self._begin(), *self._output.close("incomplete")]
        self._told["status"] = "failed"
        self._told["error"] = {"code": code, "message": str(error)}
        return self._numbered([*events, self._state("failed")])

    def whole(self) -> dict[str, Any]:
        """The response, as far as it is complete."""
        return {**self._told, "output": list(self._output.items)}

    def _begin(self) -> list[Event]:
        if self._has_begun:
            return []
        self._has_begun = True
        return [self._state("created"), self._state("in_progress")]

    def _part(self, part: Part) -> list[Event]:
        tokens, self._untold = self._untold, []
        if isinstance(part, Content):
            return self._output.text(part.text, self._logprobs(tokens))
        if isinstance(part, Reasoning):
            return self._output.reasoning(part.text)
        events = []
        if part.name is not None:
            events += self._output.call(f"call_{uuid.uuid4().hex}", part.name)
        return events + self._output.arguments(part.arguments)

    def _logprobs(self, tokens: list[Token]) -> list[dict[str, Any]]:
        if self._spelling is None:
            return []
        return [one.model_dump() for one in chat_logprobs(tokens, self._spelling)]

    def _end(self, end: End) -> list[Event]:
        self._told["usage"] = usage_of(self.counts)
        self._told["completed_at"] = int(time.time())
        state = "completed"
        if end.reason is Reason.LENGTH:
            state = "incomplete"
            self._told["incomplete_details"] = {"reason": "max_output_tokens"}
        events = self._output.close(state)
        self._told["status"] = state
        return [*events, self._state(state)]

    def _state(self, name: str) -> Event:
        return {"type": f"response.{name}", "response": self.whole()}

    def _numbered(self, events: list[Event]) -> list[Event]:
        first, self._number = self._number, self._number + len(events)
        return [{**event, "sequence_number": at} for at, event in enumerate(events, first)]
