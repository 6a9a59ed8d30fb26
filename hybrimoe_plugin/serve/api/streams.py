"""Answers end when their client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.service import Service

Found = TypeVar("Found")


def batching_header(service: Service) -> dict[str, str]:
    """Tells clients whether answers are computed together or one after another."""
    return {"x-hybrimoe-batching": "together" if service.scheduler.together else "queued"}


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        events: whole events, each ending with an empty line.
        on_close: called when the last one is sent or the client has left, whichever is first.
    """

    def __init__(
        self,
        events: AsyncIterator[str],
        on_close: Callable[[], None],
        headers: dict[str, str],
    ) -> None:
        # Proxies must not hold events back.
        own = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers={**headers, **own}, media_type="text/event-stream")
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A generator that waits for its reader would be closed later, by the garbage collector.
            self._on_close()


async def while_connected(request: Request, work: Coroutine[Any, Any, Found]) -> Found:
    """What the work gives. It is cancelled when the client leaves.

    Args:
        request: whose body has been read.

    Raises:
        ApiError: the client has left; nobody will read it.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "the client has left")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
