"""From questions to an HTTP answer, the same for both endpoints."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request, Response
from openai.types.completion_usage import CompletionUsage

from hybrimoe_plugin.serve.api.errors import as_api_error, openai_body
from hybrimoe_plugin.serve.api.openai_completions.fields import Options
from hybrimoe_plugin.serve.api.openai_completions.told import usage_of
from hybrimoe_plugin.serve.api.streams import EventStream, batching_header, while_connected
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.asking import Answer, Answers, Delta, Question, collected


class Writer(Protocol):
    """Writes answers in an endpoint's form; each method gives JSON."""

    def whole(self, answers: Sequence[Answer], usage: CompletionUsage) -> str: ...

    def first(self, choice: int) -> str | None: ...

    def more(self, delta: Delta) -> str | None: ...

    def usage(self, usage: CompletionUsage) -> str: ...


@dataclass(frozen=True)
class Exchange:
    """One HTTP request and what it takes to answer it.

    Attributes:
        questions: all choices of the first prompt, then all of the second, and so on.
    """

    service: Service
    request: Request
    options: Options
    questions: Sequence[Question]
    writer: Writer

    async def answer(self) -> Response:
        """The whole answer, or a stream that has not begun.

        Raises:
            HybriMoEError: nothing is answered.
        """
        headers = batching_header(self.service)
        if self.options.stream:
            answers = Answers(self.service, self.questions)
            return EventStream(self._events(answers), answers.close, headers)
        found = await while_connected(self.request, collected(self.service, self.questions))
        content = self.writer.whole(found, self._usage(found))
        return Response(content, headers=headers, media_type="application/json")

    async def _events(self, answers: Answers) -> AsyncIterator[str]:
        try:
            async for told in self._chunks(answers):
                yield f"data: {told}\n\n"
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status has been sent: this is how clients learn of it
            yield f"data: {json.dumps(openai_body(as_api_error(error)))}\n\n"

    async def _chunks(self, answers: Answers) -> AsyncIterator[str]:
        for choice in range(len(self.questions)):
            first = self.writer.first(choice)
            if first is not None:
                yield first
        counts = [Answer() for _ in self.questions]
        async for delta in answers.deltas():
            count = counts[delta.index]
            count.add(Delta(delta.index, cached_tokens=delta.cached_tokens, end=delta.end))
            more = self.writer.more(delta)
            if more is not None:
                yield more
        usage = self._usage(counts)
        if self.options.include_usage:
            yield self.writer.usage(usage)

    def _usage(self, answers: Sequence[Answer]) -> CompletionUsage:
        """Each prompt counts once, however many choices it has."""
        step = self.options.wanted.choices
        prompt = sum(len(one.request.prompt) for one in self.questions[::step])
        completion = sum(one.completion_tokens for one in answers)
        cached = sum(one.cached_tokens for one in answers[::step])
        self.request.state.tokens = (prompt, completion)  # for the log
        return usage_of(prompt, completion, cached)
