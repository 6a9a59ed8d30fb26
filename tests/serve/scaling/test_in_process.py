"""An application answers without a socket, piece by piece, and learns that a client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from hybrimoe_plugin.serve.scaling import in_process
from hybrimoe_plugin.serve.scaling.messages import Call, Start


def call(path: str, body: bytes = b"", method: str = "GET") -> Call:
    return Call(method, path, b"a=1", ((b"host", b"here"),), body, ("1.2.3.4", 5))


async def whole(app: Any, asked: Call) -> list[Any]:
    return [part async for part in in_process.answer(app, asked)]


def test_the_request_arrives_as_it_was_sent() -> None:
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, Any]:
        assert request.client is not None
        body = (await request.body()).decode()
        query = str(request.query_params)
        return {"body": body, "query": query, "from": request.client.host}

    start, body = asyncio.run(whole(app, call("/echo", b"text", "POST")))
    assert start.status == 200
    assert (b"content-type", b"application/json") in start.headers
    assert body == b'{"body":"text","query":"a=1","from":"1.2.3.4"}'


def test_pieces_come_as_they_are_made() -> None:
    async def run() -> None:
        gate = asyncio.Event()

        async def pieces() -> AsyncIterator[bytes]:
            yield b"one"
            await gate.wait()
            yield b"two"

        app = FastAPI()
        app.get("/")(lambda: StreamingResponse(pieces()))
        parts = in_process.answer(app, call("/"))
        assert isinstance(await anext(parts), Start)
        assert await anext(parts) == b"one"
        gate.set()
        assert [part async for part in parts] == [b"two"]

    asyncio.run(run())


@pytest.mark.parametrize("taken", [1, 2])
def test_a_client_that_leaves_is_noticed(taken: int) -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def pieces() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"more"
                    await asyncio.sleep(0)
            finally:
                ended.set()

        app = FastAPI()
        app.get("/")(lambda: StreamingResponse(pieces()))
        parts = in_process.answer(app, call("/"))
        for _ in range(taken):
            await anext(parts)
        await asyncio.sleep(0.01)  # the queue is full by now
        await parts.aclose()
        await asyncio.wait_for(ended.wait(), 10)

    asyncio.run(run())


def test_an_application_that_ends_too_early_is_an_error() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("a bug")

    with pytest.raises(RuntimeError, match="ended before its answer"):
        asyncio.run(whole(app, call("/")))


def test_the_answer_to_a_bug_is_complete() -> None:
    app = FastAPI()

    @app.get("/")
    async def bug() -> None:
        raise ValueError("a bug")

    start, body = asyncio.run(whole(app, call("/")))
    assert start.status == 500
    assert body == b"Internal Server Error"
