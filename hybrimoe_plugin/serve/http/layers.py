"""All layers around the application, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from hybrimoe_plugin.serve.http.bodies import Bodies
from hybrimoe_plugin.serve.http.closing import Closing
from hybrimoe_plugin.serve.http.hosts import LocalHosts, is_local
from hybrimoe_plugin.serve.http.ids import RequestIds
from hybrimoe_plugin.serve.http.keys import Keys
from hybrimoe_plugin.serve.service import Service


@dataclass(frozen=True)
class Access:
    """Who may use a server.

    Attributes:
        host: address or name that it is bound to; None leaves Host headers unchecked, as behind
            another server that has checked them.
        keys: any of them will do; without one, everybody may.
        origins: of web pages that may (CORS), `*` for all.
    """

    host: str | None = None
    keys: Sequence[str] = ()
    origins: Sequence[str] = ()


def surround(app: FastAPI, service: Service, access: Access) -> None:
    """Put the layers around an application. Mutates it.

    They are plain ASGI: streams pass through them as they are, and so does the news that a client
    has left.
    """
    # The last that is added is the outermost.
    app.add_middleware(Bodies, most_bytes=service.limits.body_bytes)
    app.add_middleware(Closing, service=service)
    if access.keys:
        app.add_middleware(Keys, keys=access.keys)
    if access.origins:
        # Outside of the keys: browsers ask without one whether they may ask.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    if access.host is not None and is_local(access.host):
        app.add_middleware(LocalHosts, host=access.host)
    headers = {} if service.scheduler.together else {"x-hybrimoe-batching": "off"}
    app.add_middleware(RequestIds, headers=headers)
