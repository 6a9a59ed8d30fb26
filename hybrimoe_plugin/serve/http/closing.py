"""A server that closes takes no new requests, and says so."""

from __future__ import annotations

from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.http.asgi import ASGIApp, Receive, Scope, Send, is_open, refuse
from hybrimoe_plugin.serve.service import Service


class Closing:
    """Refuses requests from the moment when the service closes; those that run go on."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_new = scope["type"] == "http" and not is_open(scope)
        if is_new and self._service.closing:
            error = ApiError(503, "the server is being shut down")
            await refuse(scope, receive, send, error, {"connection": "close"})
            return
        await self.app(scope, receive, send)
