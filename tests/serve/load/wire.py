"""Clients that speak HTTP badly: they leave, read slowly, or do not end what they say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Mapping
from typing import Any

SMALL_BUFFER = 4096
"""Bytes that the system receives for a reader that does not read."""


def request(path: str, body: bytes, length: int | None = None) -> bytes:
    """A POST request.

    Args:
        length: what the header says; None for the truth.
    """
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection whose receiving end has little room."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=made, limit=SMALL_BUFFER)


async def leave(port: int, path: str, body: Mapping[str, Any], seconds: float, rude: bool) -> None:
    """Ask, wait a little, and leave without having read anything.

    Args:
        rude: by a reset in place of an orderly end.
    """
    _, writer = await connect(port)
    writer.write(request(path, json.dumps(body).encode()))
    await writer.drain()
    await asyncio.sleep(seconds)
    await _close(writer, rude)


async def stop_talking(port: int, path: str, body: Mapping[str, Any], seconds: float) -> None:
    """Send half of a body, and leave."""
    whole = json.dumps(body).encode()
    _, writer = await connect(port)
    writer.write(request(path, whole[: len(whole) // 2], len(whole)))
    await writer.drain()
    await asyncio.sleep(seconds)
    await _close(writer, rude=False)


async def read_slowly(port: int, path: str, body: Mapping[str, Any], pause: float) -> bytes:
    """The whole answer's body, read in small pieces with pauses."""
    reader, writer = await connect(port)
    writer.write(request(path, json.dumps(body).encode()))
    pieces = []
    while piece := await reader.read(SMALL_BUFFER):
        pieces.append(piece)
        await asyncio.sleep(pause)
    await _close(writer, rude=False)
    head, _, rest = b"".join(pieces).partition(b"\r\n\r\n")
    return _dechunked(rest) if b"chunked" in head.lower() else rest


def events(body: bytes) -> list[Any]:
    """The JSON of a whole stream's events. Raises: ValueError: it does not end as streams do."""
    lines = [line for line in body.decode().split("\n") if line.startswith("data:")]
    if not lines or lines[-1] != "data: [DONE]":
        raise ValueError(f"a stream without an end: {body[-200:]!r}")
    return [json.loads(line.removeprefix("data:")) for line in lines[:-1]]


def _dechunked(data: bytes) -> bytes:
    """A body from its chunks. Raises: ValueError: the last one is missing."""
    pieces = []
    while True:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return b"".join(pieces)
        pieces.append(rest[:length])
        data = rest[length + 2 :]


async def _close(writer: asyncio.StreamWriter, rude: bool) -> None:
    if rude:
        writer.transport.abort()
        return
    writer.close()
    with contextlib.suppress(ConnectionError):  # the server may be quicker
        await writer.wait_closed()
