"""Which names of this machine requests may use: a web page must not reach a private server.

By DNS rebinding a page can let its own name lead to 127.0.0.1, and the browser then takes the
server here for a part of the page. Its requests have the page's name in the header Host.
"""

from __future__ import annotations

import ipaddress

from hybrimoe_plugin.serve.api.errors import ApiError
from hybrimoe_plugin.serve.http.asgi import ASGIApp, Receive, Scope, Send, headers_of, refuse

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


class LocalHosts:
    """Refuses what was not addressed to this machine's local names.

    Args:
        host: that the server is bound to, which is a name too.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self._names = LOCAL | {host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found = headers_of(scope).get(b"host", b"").decode("latin-1")
            if without_port(found).lower() not in self._names:
                message = (
                    "this server answers on its own machine alone, and the request's Host is "
                    "another name: use http://localhost, or start it with --host"
                )
                await refuse(scope, receive, send, ApiError(403, message))
                return
        await self.app(scope, receive, send)


def without_port(host: str) -> str:
    """`name` of `name:80`, `::1` of `[::1]:80`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_local(host: str) -> bool:
    """Whether only programs of this machine reach a server that is bound to this address."""
    if host.lower() in LOCAL:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
