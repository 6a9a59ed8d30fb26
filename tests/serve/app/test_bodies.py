"""Bodies that are too large, too slow, cut off, or no JSON."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from asking import ask, head, raw, rest
from serving import scripted, served

from hybrimoe_plugin.serve.http.bodies import Bodies
from hybrimoe_plugin.serve.http.layers import Access
from hybrimoe_plugin.serve.service import Limits

MOST = 1000
LENGTH = f"content-length: {MOST + 1}"
JSON = "content-type: application/json"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    service = replace(scripted(), limits=Limits(body_bytes=MOST))
    with served(service, Access("127.0.0.1")) as found:
        yield found


def test_a_body_of_the_largest_size_arrives_whole(port: int) -> None:
    assert ask(port, "/v1/echo", body=b"x" * MOST).json == {"bytes": MOST}


def test_a_larger_one_is_refused_by_its_length_alone(port: int) -> None:
    found = raw(port, head("/v1/echo", JSON, LENGTH))
    assert found.startswith(b"HTTP/1.1 413 ") and b"request_too_large" in found


def test_a_larger_one_is_refused_without_a_length_too(port: int) -> None:
    chunk = b"100\r\n" + b"x" * 256 + b"\r\n"
    found = raw(port, head("/v1/echo", JSON, "transfer-encoding: chunked") + 4 * chunk)
    assert found.startswith(b"HTTP/1.1 413 ")


def test_chunks_below_the_limit_are_joined(port: int) -> None:
    chunks = b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    sent = head("/v1/echo", JSON, "transfer-encoding: chunked", "connection: close") + chunks
    assert raw(port, sent).endswith(b'{"bytes":5}')


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": ""},
        {"content-encoding": "gzip"},
    ],
)
def test_only_plain_json_is_taken(headers: dict[str, str], port: int) -> None:
    """A web page could send the others here without asking first."""
    assert ask(port, "/v1/echo", headers, b"{}").status == 415


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 100_000,
        head("/v1/echo", JSON, "content-length: -1"),
        head("/v1/echo", JSON, "content-length: 1", "content-length: 2"),
        head("/v1/echo", JSON, "transfer-encoding: chunked") + b"no chunk\r\n",
        head("/v1/echo", JSON, "bad header"),
    ],
)
def test_what_is_no_http_is_refused_and_the_next_request_is_answered(
    sent: bytes, port: int
) -> None:
    found = raw(port, sent)
    assert found == b"" or found.startswith(b"HTTP/1.1 4")
    assert ask(port, "/health").status == 200


def test_a_client_that_leaves_before_its_body_is_complete_is_forgotten(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head("/v1/echo", JSON, "content-length: 100") + b"x")
    assert ask(port, "/v1/echo", body=b"{}").json == {"bytes": 2}


def test_headers_that_never_end_close_the_connection(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe_plugin.serve.http.protocol import ImpatientProtocol

    monkeypatch.setattr(ImpatientProtocol, "seconds", 0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        time.sleep(0.1)
        connection.sendall(b"x: y\r\n")  # another byte does not start the clock anew
        assert rest(connection) == b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as silent:
        assert rest(silent) == b""


class Client:
    """An ASGI client of one request whose parts arrive as a test says."""

    def __init__(self, *parts: bytes, stalls: bool = False) -> None:
        self._parts = list(parts)
        self._stalls = stalls
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        if self._parts:
            body = self._parts.pop(0)
            more = bool(self._parts) or self._stalls
            return {"type": "http.request", "body": body, "more_body": more}
        await asyncio.Event().wait()

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def ask(self, bodies: Bodies) -> int:
        headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
        await bodies({"type": "http", "path": "/", "headers": headers}, self.receive, self.send)
        return int(self.sent[0]["status"])


async def app(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_a_body_that_stops_arriving_is_given_up() -> None:
    bodies = Bodies(app, MOST, seconds=0.05)
    assert asyncio.run(Client(b"x", stalls=True).ask(bodies)) == 408
    assert bodies._kept == 0


def test_all_bodies_together_have_a_limit() -> None:
    async def fill() -> int:
        bodies = Bodies(app, MOST, seconds=30)
        stalled = [Client(b"x" * MOST, stalls=True) for _ in range(16)]
        tasks = [asyncio.create_task(client.ask(bodies)) for client in stalled]
        while bodies._kept < 16 * MOST:
            await asyncio.sleep(0)
        status = await Client(b"x").ask(bodies)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert bodies._kept == 0
        assert await Client(b"x").ask(bodies) == 200
        return status

    assert asyncio.run(fill()) == 503
