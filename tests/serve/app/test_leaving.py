"""A client that leaves is noticed, whatever it has sent before."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request
from serving import scripted, wait_until

from hybrimoe_plugin.serve.api.streams import while_connected
from hybrimoe_plugin.serve.http.server import Server, listen


class Waiting:
    """An endpoint whose answer never comes."""

    def __init__(self) -> None:
        self.begun, self.ended = threading.Event(), threading.Event()
        self.app = FastAPI()
        self.app.get("/wait")(self._wait)

    async def _wait(self, request: Request) -> None:
        async def work() -> None:
            self.begun.set()
            await asyncio.sleep(600)

        try:
            await while_connected(request, work())
        finally:
            self.ended.set()


@pytest.fixture
def server() -> Iterator[tuple[Waiting, int]]:
    waiting, service, ready = Waiting(), scripted(), threading.Event()
    with listen("127.0.0.1", 0) as port:
        server = Server(waiting.app, service, 1.0, ready.set)
        thread = threading.Thread(target=server.run, args=([port],), daemon=True)
        thread.start()
        assert ready.wait(30)
        yield waiting, port.getsockname()[1]
        server.close()
        thread.join(30)


@pytest.mark.parametrize("later", [b"", b"\r\n", b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n"])
def test_it_is_noticed_behind_what_came_after_the_request(
    server: tuple[Waiting, int], later: bytes
) -> None:
    waiting, port = server
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(b"GET /wait HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert waiting.begun.wait(30)
    connection.sendall(later)
    connection.close()
    wait_until(waiting.ended.is_set, 10)
