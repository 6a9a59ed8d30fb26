"""Bodies of requests: JSON, of a limited size, that arrive in a limited time.

They are read whole before a handler runs, so that no handler has to see to any of this.
"""

from __future__ import annotations

import asyncio

from hybrimoe_plugin.files import human
from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.http.asgi import (
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
    headers_of,
    refuse,
)

SECONDS = 60.0
"""In which a body must have arrived."""
TOGETHER = 16
"""Bodies of the largest size that are kept at once, while their requests are answered."""


class _LeftError(Exception):
    """The client went away before its body was complete."""


class Bodies:
    """Hands over requests whose body is complete.

    Args:
        most_bytes: of one body.
        seconds: in which it must have arrived.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, seconds: float = SECONDS) -> None:
        self.app = app
        self._most = most_bytes
        self._most_kept = TOGETHER * most_bytes
        self._seconds = seconds
        self._kept = 0
        """Bytes of all bodies."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(headers_of(scope)):
            await self.app(scope, receive, send)
            return
        parts = bytearray()
        try:
            try:
                self._check_headers(headers_of(scope))
                await asyncio.wait_for(self._read(receive, parts), self._seconds)
            except asyncio.TimeoutError:
                message = f"the request's body did not arrive within {self._seconds:g} s"
                raise ApiError(408, message) from None
            await self.app(scope, _once(bytes(parts), receive), send)
        except _LeftError:
            pass
        except ApiError as error:
            # What is left of the body is not read.
            await refuse(scope, receive, send, error, {"connection": "close"})
        finally:
            self._kept -= len(parts)

    def _check_headers(self, headers: dict[bytes, bytes]) -> None:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "a request's body must be JSON: send content-type application/json")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "a request's body must not be compressed")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._most:
            raise self._too_large()

    async def _read(self, receive: Receive, parts: bytearray) -> None:
        """Add the body to `parts`, as it arrives."""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _LeftError
            part = message.get("body", b"")
            if len(parts) + len(part) > self._most:
                raise self._too_large()
            if self._kept + len(part) > self._most_kept:
                raise ApiError(503, "too many large requests at once: try again later")
            self._kept += len(part)
            parts += part
            more = message.get("more_body", False)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request's body is larger than {human(self._most)}")


def has_body(headers: dict[bytes, bytes]) -> bool:
    """Whether one comes, by the headers."""
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def _once(body: bytes, receive: Receive) -> Receive:
    """Gives the whole body first, then what else comes: that the client has left."""
    is_given = False

    async def given() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return given
