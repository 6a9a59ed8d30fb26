"""A server's application without a model, for tests of what is around it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from scripted_scheduler import ScriptedScheduler

from hybrimoe_plugin.serve.requests import End, Sampling, Token
from hybrimoe_plugin.serve.requests import Request as Asked


class Letters:
    """A tokenizer with one token for each character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


class Waiting:
    """Implements `Sink`: hands tokens to a coroutine."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[Token | End] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def started(self, cached_tokens: int) -> None: ...

    def put(self, token: Token) -> bool:
        self._loop.call_soon_threadsafe(self.items.put_nowait, token)
        return True

    def end(self, end: End) -> None:
        self._loop.call_soon_threadsafe(self.items.put_nowait, end)


@contextmanager
def make_app(arguments: Sequence[str], threads: int) -> Iterator[FastAPI]:
    """A `MakeApp`: answers `arguments[0]`.

    A request with the field `hold` goes on after its first token when a file of this name is there.
    """
    scheduler = ScriptedScheduler(Letters(), arguments[0])
    app = FastAPI()
    state: dict[str, Any] = {"healthy": True, "running": 0, "cancelled": 0}

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"threads": threads}, status_code=200 if state["healthy"] else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "scripted"}]}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        lines = [f"# TYPE {name} gauge\n{name} {float(state[name])}\n" for name in state]
        return PlainTextResponse("".join(lines))

    @app.post("/ill")
    async def ill() -> dict[str, Any]:
        state["healthy"] = False
        return {}

    @app.post("/pid")
    async def pid() -> int:
        return os.getpid()

    @app.post("/die")
    async def die() -> None:
        os._exit(1)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        pieces = _held(body.get("hold"), _answer(scheduler, state))
        if body.get("stream"):
            return StreamingResponse(pieces, media_type="text/event-stream")
        whole = [piece async for piece in pieces]
        return {"pieces": len(whole), "said": body["messages"][-1]["content"]}

    yield app


async def _held(gate: str | None, pieces: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    try:
        async for piece in pieces:
            yield piece
            while gate and not Path(gate).exists():
                await asyncio.sleep(0.01)
    finally:
        await pieces.aclose()


async def _answer(scheduler: ScriptedScheduler, state: dict[str, Any]) -> AsyncGenerator[str, None]:
    sink = Waiting()
    ticket = scheduler.submit(Asked("1", (1,), sampling=Sampling()), sink)
    state["running"] += 1
    ended = False
    try:
        while isinstance(item := await sink.items.get(), Token):
            chunk = {"choices": [{"index": 0, "delta": {"content": chr(item.id)}}]}
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"
        ended = True
    finally:
        ticket.cancel()
        state["running"] -= 1
        state["cancelled"] += not ended
