"""A stand-in for the chat endpoint: a scripted scheduler's tokens as chunks of OpenAI's API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Body
from fastapi.responses import StreamingResponse

from hybrimoe_plugin.serve.requests import End, Reason, Request, Sampling, Token
from hybrimoe_plugin.serve.service import Service

STEP = 3
"""Characters of a token."""


class PieceTokenizer:
    """Tokens are pieces of a text that it has been shown."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        first = len(self._pieces)
        self._pieces += [text[at : at + STEP] for at in range(0, len(text), STEP)]
        return list(range(first, len(self._pieces)))

    def decode(self, ids: list[int]) -> str:
        return "".join(self._pieces[token] for token in ids)


class _Queue:
    """A sink that hands over to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[Token | End] = asyncio.Queue()

    def started(self, cached_tokens: int) -> None: ...

    def put(self, token: Token) -> bool:
        self._loop.call_soon_threadsafe(self.items.put_nowait, token)
        return True

    def end(self, end: End) -> None:
        self._loop.call_soon_threadsafe(self.items.put_nowait, end)


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.name, "object": "model"}]}

    @routes.post("/v1/chat/completions")
    async def chat(body: dict[str, Any] = Body()) -> StreamingResponse:  # noqa: B008
        sampling = Sampling(temperature=body.get("temperature", 1.0), seed=body.get("seed"))
        prompt = json.dumps(body["messages"])
        ids = service.tokenizer.encode(prompt)
        request = Request("one", tuple(ids), body.get("max_tokens"), sampling)
        return StreamingResponse(chunks(service, request), media_type="text/event-stream")

    return routes


async def chunks(service: Service, request: Request) -> AsyncGenerator[str, None]:
    sink = _Queue()
    ticket = service.scheduler.submit(request, sink)
    try:
        while isinstance(item := await sink.items.get(), Token):
            yield _chunk({"delta": {"content": service.tokenizer.decode([item.id])}})
        if item.reason is Reason.FAILED:
            yield f"data: {json.dumps({'error': {'message': str(item.error), 'code': 500}})}\n\n"
            return
        yield _chunk({"delta": {}, "finish_reason": item.reason.value})
        usage = {"prompt_tokens": len(request.prompt), "completion_tokens": item.tokens}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        ticket.cancel()


def _chunk(choice: dict[str, Any]) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n"
