"""GET /v1/live: the engine as it works, as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from starlette.types import Message, Send

from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.live.feed import INTERVAL_S, Feed
from hybrimoe_plugin.serve.live.places import ExpertStore
from hybrimoe_plugin.serve.live.sources import EngineSource, Source, StoreSource
from hybrimoe_plugin.serve.service import Service

SLOWEST_S = 20.0
"""A watcher that takes nothing for so long has gone, or hangs."""
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def router(service: Service, interval_s: float = INTERVAL_S) -> APIRouter:
    """The endpoint. A watcher needs the API key like any other client."""
    routes = APIRouter()
    feed = Feed(service, source_of(service.model, service.store), interval_s)

    @routes.get("/v1/live")
    async def live() -> StreamingResponse:
        if feed.full:
            raise ApiError(429, "as many watch the engine as may; close another page")
        return WatcherResponse(feed.events())

    return routes


def source_of(model: Any, store: ExpertStore | None) -> Source | None:
    """What there is to show of a model; None for one without experts of ours."""
    if store is not None:
        return StoreSource(store)
    handle = getattr(model, "hybrimoe", None)
    if handle is None or not handle.engines:
        return None
    return EngineSource(handle.engines)


class WatcherResponse(StreamingResponse):
    """Gives its place up when the watcher leaves, or takes nothing any more."""

    def __init__(self, events: AsyncGenerator[bytes, None], slowest_s: float = SLOWEST_S) -> None:
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self._events = events
        self._slowest_s = slowest_s

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), self._slowest_s)

        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await super().stream_response(send_in_time)
        finally:
            await self._events.aclose()
