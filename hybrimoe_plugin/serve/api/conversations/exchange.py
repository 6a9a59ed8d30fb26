"""From a question to an HTTP answer, whole or in events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import Request, Response

from hybrimoe_plugin.serve.api.conversations.counts import Counts
from hybrimoe_plugin.serve.api.errors import ApiError, as_api_error
from hybrimoe_plugin.serve.api.streams import EventStream, batching_header, while_connected
from hybrimoe_plugin.serve.service import Service
from hybrimoe_plugin.serve.text.asking import Answers, Delta, Question

Event = dict[str, Any]
"""A server-sent event; `type` is its name too."""

QUIET_SECONDS = 15.0
"""Proxies close connections that say nothing for a minute."""


class Telling(Protocol):
    """Tells one answer in an API's own way."""

    counts: Counts

    def take(self, delta: Delta) -> list[Event]:
        """The events of what is new."""

    def quiet(self) -> list[Event]:
        """What is told while nothing is new."""

    def failed(self, error: ApiError) -> list[Event]:
        """The events of an answer that ends by an error."""

    def whole(self) -> dict[str, Any]:
        """The complete answer, after its last delta."""


async def exchange(
    service: Service,
    request: Request,
    question: Question,
    telling: Telling,
    stream: bool,
    headers: dict[str, str],
) -> Response:
    """The whole answer, or a stream that has not begun.

    Raises:
        HybriMoEError: nothing is answered.
    """
    headers = {**batching_header(service), **headers}
    if stream:
        answers = Answers(service, [question])
        return EventStream(_events(request, answers, telling), answers.close, headers)
    await while_connected(request, _read(service, question, telling))
    _log(request, telling)
    # ASCII: what a model writes as JSON may hold halves of characters.
    whole = json.dumps(telling.whole())
    return Response(whole, headers=headers, media_type="application/json")


async def _read(service: Service, question: Question, telling: Telling) -> None:
    answers = Answers(service, [question])
    try:
        async for delta in answers.deltas():
            telling.take(delta)
    finally:
        answers.close()


async def _events(request: Request, answers: Answers, telling: Telling) -> AsyncIterator[str]:
    try:
        async for delta in _or_none(answers.deltas(), QUIET_SECONDS):
            told = telling.quiet() if delta is None else telling.take(delta)
            if told:
                yield "".join(map(_written, told))
    except Exception as error:  # the status has been sent: this is how clients learn of it
        yield "".join(map(_written, telling.failed(as_api_error(error))))
    _log(request, telling)


async def _or_none(deltas: AsyncIterator[Delta], seconds: float) -> AsyncIterator[Delta | None]:
    """The deltas, and None whenever none has come for so long."""
    coming: asyncio.Future[Delta] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.ensure_future(anext(deltas))
            done, _ = await asyncio.wait({coming}, timeout=seconds)
            if not done:
                yield None
                continue
            try:
                delta = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield delta
    finally:
        if coming is not None:
            coming.cancel()


def _log(request: Request, telling: Telling) -> None:
    """Leave for the log how many tokens there were."""
    request.state.tokens = (telling.counts.prompt, telling.counts.answer)


def _written(event: Event) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
