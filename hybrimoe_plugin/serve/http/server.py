"""The process: listens, and closes in order when it is told to end."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from hybrimoe_plugin.errors import ConfigError
from hybrimoe_plugin.serve.http.protocol import ImpatientProtocol
from hybrimoe_plugin.serve.service import Service

log = logging.getLogger(__name__)

INTERRUPTED = 130
_WRITING_SECONDS = 5.0
"""For clients to read the ends of their answers, when all are computed."""
_BACKLOG = 512


class Server(uvicorn.Server):
    """Serves until a signal; then finishes what runs, and refuses the rest.

    While it closes it still listens: new requests are told so, and `/health` is 503. A second
    signal ends the process at once.

    Args:
        seconds: for running answers to be finished; afterwards they are cancelled.
        on_ready: called when the port is open.
    """

    def __init__(
        self,
        app: FastAPI,
        service: Service,
        seconds: float,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=ImpatientProtocol,
                ws="none",
                loop="asyncio",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=int(_WRITING_SECONDS),
            )
        )
        self._service = service
        self._seconds = seconds
        self._on_ready = on_ready

    def close(self) -> None:
        """Begin to close; returns at once. Any thread; once."""
        self._service.closing = True
        threading.Thread(target=self._finish, name="closing", daemon=True).start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the interpreter for SIGINT and SIGTERM.

        uvicorn's own would raise the signal again at the end, and cut answers off.
        """
        if self._service.closing:
            with contextlib.suppress(OSError):
                os.write(2, b"hybrimoe: ended by a second signal\n")
            os._exit(INTERRUPTED)
        self.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def _finish(self) -> None:
        running = self._service.scheduler.load().running
        if running:
            log.warning("finishing %d answer(s); a second signal ends at once", running)
        try:
            self._service.scheduler.close(self._seconds)
        except Exception as error:
            log.error("the scheduler did not close: %s", type(error).__name__, exc_info=error)
        finally:
            self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Take a port; it answers once a server runs on it.

    Args:
        port: 0 for any that is free.

    Raises:
        ConfigError: there is no such address here, or the port is taken.
    """
    flags = socket.AI_PASSIVE
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no name of a host"
        raise ConfigError(f"--host {host}: {reason}") from None
    # Of a name that has both, such as localhost, the address that more clients try.
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    taken = socket.socket(family, kind, protocol)
    try:
        # Without this, a port is taken for a minute after a server has ended.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return taken
