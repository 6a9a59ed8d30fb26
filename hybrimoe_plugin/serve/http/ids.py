"""The outermost layer: ids of requests, one line of the log for each, and errors nobody foresaw."""

from __future__ import annotations

import logging
import re
import time
import traceback
import uuid
from collections.abc import Mapping

from starlette.requests import ClientDisconnect

from hybrimoe_plugin.files import one_line
from hybrimoe_plugin.serve.api.errors import as_api_error
from hybrimoe_plugin.serve.http.asgi import (
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
    headers_of,
    refuse,
)

log = logging.getLogger(__name__)
access = logging.getLogger("hybrimoe_plugin.serve.access")
"""One line for each request, on level INFO: never prompts, answers or keys."""

_NAMES = (b"x-request-id", b"request-id")
"""As OpenAI and Anthropic call it."""

_SANE = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_LONGEST_PATH = 200


class RequestIds:
    """Gives every request an id, which its answer and the log name.

    Handlers find it in `request.state.request_id`, and may say in `request.state.tokens` how many
    tokens prompt and answer have, as a pair.

    Args:
        headers: more headers, in small letters, for every answer that does not have them itself.
    """

    def __init__(self, app: ASGIApp, headers: Mapping[str, str] | None = None) -> None:
        self.app = app
        self._headers = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in (headers or {}).items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        known = request_id(headers_of(scope).get(b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = known
        begun = time.monotonic()
        status: int | None = None

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = list(message.get("headers", ()))
                present = {name.lower() for name, _ in given}
                own = [(name, known.encode()) for name in _NAMES] + self._headers
                message["headers"] = given + [pair for pair in own if pair[0] not in present]
            await send(message)

        try:
            await self.app(scope, receive, named)
        except ClientDisconnect:
            pass
        except Exception as error:
            _report(known, error)
            if status is None:
                await refuse(scope, receive, named, as_api_error(error))
            # An answer that has begun ends here: the server closes its connection.
        finally:
            _log(scope, known, status, time.monotonic() - begun)


def request_id(given: bytes | None) -> str:
    """The id that a client chose, if it is harmless; otherwise a new one."""
    if given is not None and _SANE.fullmatch(given):
        return given.decode()
    return f"req-{uuid.uuid4().hex}"


def _report(known: str, error: Exception) -> None:
    """Say where it was raised; what it says may quote a prompt, so that is for -v alone."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
    log.error("request %s failed: %s (%s)", known, type(error).__name__, place)
    log.info("in detail", exc_info=error)


def _log(scope: Scope, known: str, status: int | None, seconds: float) -> None:
    path = one_line(scope["path"])[:_LONGEST_PATH]
    parts = [known, scope["method"][:20], path, "left" if status is None else str(status)]
    parts.append(f"{seconds:.3f} s")
    tokens = scope["state"].get("tokens")
    if tokens is not None:
        parts.append("{} + {} tokens".format(*tokens))
    access.info(" ".join(parts))
