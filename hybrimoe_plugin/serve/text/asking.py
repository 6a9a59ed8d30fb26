"""Ask the scheduler for one or several answers, and read them as they come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.serve.requests import (
    ClosingError,
    End,
    LateError,
    Reason,
    Request,
    Ticket,
    Token,
)
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.channel import AnswerSink, Channel, Item, Piece, Started
from hybrimoe_plugin.serve.text.parts import Content, Part, Parts, Plain, Reasoning, ToolCall


class FailedError(HybriMoEError):
    """An answer could not be computed."""


@dataclass(frozen=True)
class Question:
    """One answer that is asked for, and how its text is read.

    Attributes:
        parts: divides this answer's text, and no other's.
        stops, keep_stop, skip_special_tokens, hidden: as of `AnswerSink`.
    """

    request: Request
    parts: Parts = field(default_factory=Plain)
    stops: tuple[str, ...] = ()
    keep_stop: bool = False
    skip_special_tokens: bool = True
    hidden: frozenset[int] = frozenset()


@dataclass
class Delta:
    """What is new of one answer; several tokens where the reader was late.

    Attributes:
        index: of the answer.
        cached_tokens: of the prompt; told once.
        steps: the same tokens, each with those of the parts that it made certain.
        stop: the stop string that has ended the text; "" where none has.
        end: set in the answer's last delta.
    """

    index: int
    parts: list[Part] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    cached_tokens: int | None = None
    steps: list[tuple[Token | None, list[Part]]] = field(default_factory=list)
    stop: str = ""
    end: End | None = None


class Answers:
    """Some answers that are computed for one HTTP request.

    Submitted when this is made, on the event loop; `close` must be called in the end.

    Raises:
        QueueFullError, PromptError, ClosingError: one was refused, and none is computed.
    """

    def __init__(self, service: Service, questions: Sequence[Question]) -> None:
        self._questions = questions
        self._channel = Channel()
        self._tickets: list[Ticket] = []
        self._is_late = False
        seconds = service.limits.seconds
        self._seconds = seconds
        self._until = None if seconds is None else time.monotonic() + seconds
        try:
            for index, question in enumerate(questions):
                sink = AnswerSink(
                    index,
                    self._channel,
                    service.tokenizer,
                    question.stops,
                    question.keep_stop,
                    question.skip_special_tokens,
                    question.hidden,
                )
                self._tickets.append(service.scheduler.submit(question.request, sink))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancel what is not finished."""
        for ticket in self._tickets:
            ticket.cancel()

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is new, until all answers have ended. At most one delta an answer at a time.

        Raises:
            LateError: the time is over.
            ClosingError: an answer was ended from outside.
            HybriMoEError: an answer could not be computed. The others are cancelled.
        """
        running = len(self._questions)
        try:
            while running:
                new: dict[int, Delta] = {}
                for index, item in await self._taken():
                    self._add(new.setdefault(index, Delta(index)), item)
                for delta in new.values():
                    running -= delta.end is not None
                    error = None if delta.end is None else _error(delta.end)
                    if error is None:
                        yield delta
                        continue
                    delta.end = None  # what came before the failure is worth having
                    yield delta
                    raise error
        finally:
            self.close()

    async def _taken(self) -> list[tuple[int, Item]]:
        if self._until is None:
            return await self._channel.take()
        left = self._until - time.monotonic()
        if left > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(self._channel.take(), left)
        if self._is_late:
            raise LateError(f"the answer was not finished within {self._seconds:g} seconds")
        self._is_late = True
        return self._channel.ready()  # what came in time, though it is read late

    def _add(self, delta: Delta, item: Item) -> None:
        parts = self._questions[delta.index].parts
        if isinstance(item, Started):
            delta.cached_tokens = item.cached_tokens
        elif isinstance(item, Piece):
            found = parts.feed(item.text) if item.text else []
            delta.parts += found
            delta.stop = item.stop
            delta.steps.append((item.token, found))
            if item.token is not None:
                delta.tokens.append(item.token)
        else:
            rest = parts.end()
            delta.parts += rest
            delta.steps.append((None, rest))
            delta.end = item


def _error(end: End) -> HybriMoEError | None:
    """Why an answer has ended too early; None where it has not."""
    if isinstance(end.error, HybriMoEError):
        return end.error
    if end.error is not None:
        return FailedError(f"the answer could not be computed ({type(end.error).__name__})")
    if end.reason is Reason.FAILED:
        return FailedError("the answer could not be computed")
    if end.reason is Reason.CANCELLED:
        return ClosingError("the answer was cancelled")
    return None


@dataclass
class Answer:
    """One whole answer.

    Attributes:
        calls: names and arguments are complete.
        completion_tokens: as counted by the scheduler.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    cached_tokens: int = 0
    reason: Reason = Reason.STOP
    completion_tokens: int = 0

    def add(self, delta: Delta) -> None:
        """Take what is new of this answer."""
        for part in delta.parts:
            if isinstance(part, Content):
                self.content += part.text
            elif isinstance(part, Reasoning):
                self.reasoning += part.text
            else:
                self._add_call(part)
        self.tokens += delta.tokens
        if delta.cached_tokens is not None:
            self.cached_tokens = delta.cached_tokens
        if delta.end is not None:
            self.reason, self.completion_tokens = delta.end.reason, delta.end.tokens

    def _add_call(self, call: ToolCall) -> None:
        if call.name is not None:
            self.calls.append(call)
            return
        last = self.calls[-1]
        self.calls[-1] = ToolCall(last.index, last.name, last.arguments + call.arguments)


async def collected(service: Service, questions: Sequence[Question]) -> list[Answer]:
    """The whole answers, in order. Cancelled, it cancels them.

    Raises:
        HybriMoEError: as `Answers` and its `deltas`.
    """
    answers = Answers(service, questions)
    found = [Answer() for _ in questions]
    try:
        async for delta in answers.deltas():
            found[delta.index].add(delta)
    finally:
        answers.close()
    return found
