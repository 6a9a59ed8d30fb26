"""Answers of chat completions, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_usage import CompletionUsage

from hybrimoe_plugin.serve.api.openai_completions.told import chat_logprobs
from hybrimoe_plugin.serve.requests import Reason
from hybrimoe_plugin.serve.text.asking import Answer, Delta
from hybrimoe_plugin.serve.text.parts import Content, Reasoning, ToolCall
from hybrimoe_plugin.serve.text.spelling import Spelling


class ChatAnswers:
    """Writes the answers to one request.

    Args:
        spelling: to tell log-probabilities; None where they are not asked for.
        is_named: whether a certain function must be called: such an answer ends by `stop`.
    """

    def __init__(
        self, id: str, model: str, spelling: Spelling | None, is_named: bool = False
    ) -> None:
        self._id = id
        self._model = model
        self._created = int(time.time())
        self._spelling = spelling
        self._is_named = is_named
        self._have_called: set[int] = set()
        """Choices that have streamed a call."""

    def whole(self, answers: Sequence[Answer], usage: CompletionUsage) -> str:
        """The JSON of the complete answer."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        found = ChatCompletion.model_validate(
            {**self._head("chat.completion"), "choices": choices, "usage": usage}
        )
        return found.model_dump_json(exclude_unset=True)

    def first(self, choice: int) -> str:
        """The JSON of a choice's first chunk."""
        return self._chunk(choice, {"role": "assistant", "content": ""}, None, None)

    def more(self, delta: Delta) -> str | None:
        """The JSON of what is new; None where there is nothing to tell."""
        calls = [self._call(part) for part in delta.parts if isinstance(part, ToolCall)]
        if calls:
            self._have_called.add(delta.index)
        told: dict[str, Any] = {}
        content = "".join(part.text for part in delta.parts if isinstance(part, Content))
        reasoning = "".join(part.text for part in delta.parts if isinstance(part, Reasoning))
        if reasoning:
            told["reasoning_content"] = reasoning
        if content:
            told["content"] = content
        if calls:
            told["tool_calls"] = calls
        logprobs = self._logprobs(delta.tokens) if delta.tokens else None
        reason = None
        if delta.end is not None:
            reason = self._reason(delta.end.reason, delta.index in self._have_called)
        if not told and logprobs is None and reason is None:
            return None
        return self._chunk(delta.index, told, logprobs, reason)

    def usage(self, usage: CompletionUsage) -> str:
        """The JSON of the chunk that tells the number of tokens."""
        head = self._head("chat.completion.chunk")
        found = ChatCompletionChunk.model_validate({**head, "choices": [], "usage": usage})
        return found.model_dump_json(exclude_unset=True)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.content if answer.content or not answer.calls else None,
            "refusal": None,
        }
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [_without_index(self._call(call)) for call in answer.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": self._reason(answer.reason, bool(answer.calls)),
        }

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        reason: str | None,
    ) -> str:
        told = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        found = ChatCompletionChunk.model_validate(
            {**self._head("chat.completion.chunk"), "choices": [told]}
        )
        return found.model_dump_json(exclude_unset=True)

    def _call(self, call: ToolCall) -> dict[str, Any]:
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        return {
            "index": call.index,
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    def _logprobs(self, tokens: Sequence[Any]) -> dict[str, Any] | None:
        if self._spelling is None:
            return None
        return {"content": chat_logprobs(tokens, self._spelling), "refusal": None}

    def _reason(self, reason: Reason, has_called: bool) -> str:
        if reason is Reason.LENGTH:
            return "length"
        return "tool_calls" if has_called and not self._is_named else "stop"


def _without_index(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "index"}
