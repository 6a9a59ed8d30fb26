"""Keys, as the clients of both APIs send them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.http.asgi import (
    ASGIApp,
    Receive,
    Scope,
    Send,
    headers_of,
    is_open,
    refuse,
)


class Keys:
    """Refuses requests without a key: `Authorization: Bearer KEY`, or `x-api-key: KEY`.

    Args:
        keys: any of them will do.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._known = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(scope):
            headers = headers_of(scope)
            if not self._is_known(headers):
                told = "this server needs a key: send authorization: Bearer KEY, or x-api-key: KEY"
                error = ApiError(401, told)
                more = {"www-authenticate": "Bearer", "connection": "close"}
                await refuse(scope, receive, send, error, more)
                return
        await self.app(scope, receive, send)

    def _is_known(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = [headers.get(b"x-api-key", b"")]
        if kind.lower() == b"bearer":
            given.append(bearer.strip())
        # All pairs, each in constant time: how long it takes tells nothing about a key.
        same = [
            hmac.compare_digest(_digest(key), known)
            for key in given
            if key
            for known in self._known
        ]
        return any(same)


def _digest(key: bytes) -> bytes:
    """Of one length, whatever the key's."""
    return hashlib.sha256(key).digest()
