"""The types of ASGI applications, and what the layers around ours share."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrimoe_plugin.serve.api.errors import ApiError, error_answer

__all__ = ["ASGIApp", "Message", "Receive", "Scope", "Send", "headers_of", "is_open", "refuse"]

_OPEN = ("/", "/health")
_OPEN_BELOW = "/page/"
"""The page's own files, which hold no secret."""


def is_open(scope: Scope) -> bool:
    """Whether a request is answered without a key, and while the server closes."""
    path: str = scope["path"]
    return path in _OPEN or path.startswith(_OPEN_BELOW)


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """A request's headers, in small letters; of one that is repeated, the last."""
    return dict(scope["headers"])


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    error: ApiError,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answer by an error, in the form of the API that was asked."""
    answer = error_answer(scope["path"], error)
    answer.headers.update(headers or {})
    await answer(scope, receive, send)
