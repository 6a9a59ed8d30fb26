"""Ask an ASGI application within this process, without a socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message, Scope

from hybrimoe_plugin.serve.scaling.messages import Call, Start

QUEUED = 64
"""Pieces of an answer that may wait to be taken; then the application waits."""
GRACE_S = 5.0
"""How long an application may go on after it was told that the client has left."""

_log = logging.getLogger(__name__)


class _Exchange:
    """One request and its answer, as the application sees them."""

    def __init__(self, call: Call) -> None:
        self.messages: asyncio.Queue[Message | None] = asyncio.Queue(QUEUED)
        self._body: bytes | None = call.body
        self._left = asyncio.Event()

    async def receive(self) -> Message:
        """The request; after it, that the client has left."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a piece of the answer; dropped when the client has left."""
        if not self._left.is_set():
            await self.messages.put(message)

    def leave(self) -> None:
        """Nobody takes the answer any more."""
        self._left.set()
        while not self.messages.empty():  # wakes a `send` that waits for room
            self.messages.get_nowait()


async def answer(app: ASGIApp, call: Call) -> AsyncGenerator[Start | bytes, None]:
    """Give the start of an answer, then its body piece by piece.

    Closed before its end, it tells the application that the client has left.

    Raises:
        RuntimeError: the application ended before its answer did.
    """
    exchange = _Exchange(call)
    task = asyncio.create_task(_run(app, call, exchange))
    whole = False
    try:
        while not whole:
            message = await exchange.messages.get()
            if message is None:
                raise RuntimeError("the application ended before its answer did")
            if message["type"] == "http.response.start":
                headers = tuple((bytes(name), bytes(value)) for name, value in message["headers"])
                yield Start(message["status"], headers)
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
                if message.get("body"):
                    yield message["body"]
    finally:
        exchange.leave()
        if not whole and not task.done():
            asyncio.get_running_loop().call_later(GRACE_S, task.cancel)


async def _run(app: ASGIApp, call: Call, exchange: _Exchange) -> None:
    try:
        await app(_scope(call), exchange.receive, exchange.send)
    except Exception:
        # The application has made an answer of it, where it still could.
        _log.exception("%s %s failed", call.method, call.path)
    finally:
        await exchange.messages.put(None)


def _scope(call: Call) -> Scope:
    return {
        "type": "http",
        # As uvicorn: with 2.4, an application would learn of a client's leaving from `send` alone.
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": call.client,
        "server": None,
        "state": {},
    }
