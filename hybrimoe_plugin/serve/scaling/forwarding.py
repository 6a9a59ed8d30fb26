"""The ingress: hand each request to a replica, and its answer to the client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.serve.api.errors import (
    ApiError,
    anthropic_body,
    as_api_error,
    error_answer,
    openai_body,
    speaks_anthropic,
)
from hybrimoe_plugin.serve.scaling import metrics
from hybrimoe_plugin.serve.scaling.affinity import conversation_key
from hybrimoe_plugin.serve.scaling.messages import (
    Accepted,
    Answer,
    Call,
    Headers,
    Part,
    Parts,
    ReplicaLostError,
    Replicas,
    Start,
)

SESSION = "x-session-id"
"""Header by which a client may name its conversation."""
REQUEST_ID = b"x-request-id"
"""Ray's proxy chooses it where the client has not, and adds it to answers itself."""
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
REPLICA = b"x-replica"
"""Header that says which replica has answered."""
ASKED_OF_ALL = ("/health", "/metrics", "/v1/models")
"""Answered while every replica is busy, since load balancers ask for them."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forwarding:
    """How much is forwarded, and how hard it is tried.

    Attributes:
        attempts: replicas that are tried; with two, a request that kills them kills no third.
        wait_s: how long a request waits for a replica that is free.
    """

    attempts: int = 2
    wait_s: float = 60.0


def ingress(replicas: Replicas, limits: Forwarding) -> Starlette:
    """The application that takes requests of clients, without the layers around it."""

    async def forwarded(request: Request) -> Response:
        return await _forward(request, replicas, limits)

    return Starlette(routes=[Route("/{path:path}", forwarded, methods=METHODS)])


async def _forward(request: Request, replicas: Replicas, limits: Forwarding) -> Response:
    try:
        call = await _read(request)
        if call.method == "GET" and call.path in ASKED_OF_ALL:
            return _from_all(call.path, await replicas.ask_all(call))
        key = conversation_key(call.body, request.headers.get(SESSION))
        return await _answer(call, key, replicas, limits)
    except HybriMoEError as error:
        return error_answer(request.url.path, as_api_error(error))


async def _read(request: Request) -> Call:
    return Call(
        method=request.method,
        path=request.url.path,
        query=request.scope.get("query_string", b""),
        headers=tuple(request.headers.raw),
        body=await request.body(),
        client=None if request.client is None else (request.client.host, request.client.port),
    )


async def _answer(call: Call, key: str | None, replicas: Replicas, limits: Forwarding) -> Response:
    """Try replicas until one has begun to answer."""
    for attempt in range(1, limits.attempts + 1):
        parts = replicas.send(call, key)
        try:
            return await _begun(call, parts, limits.wait_s)
        except ReplicaLostError as lost:
            _log.warning("%s %s, attempt %d: %s", call.method, call.path, attempt, lost)
        except BaseException:
            await parts.aclose()
            raise
    raise ApiError(502, f"{limits.attempts} replicas died before they could answer")


async def _begun(call: Call, parts: Parts, wait_s: float) -> Response:
    """An answer that has a first byte to stream, or none at all."""
    accepted = await _accepted(parts, wait_s)
    start = await parts.__anext__()
    if not isinstance(start, Start):
        raise TypeError(f"expected the start of an answer, got {type(start).__name__}")
    first = await _next(parts)
    headers = [(name, value) for name, value in start.headers if name != REQUEST_ID]
    headers.append((REPLICA, accepted.replica.encode()))
    if first is None:
        return _raw(Response(status_code=start.status), headers)
    body = _body(call.path, start.headers, first, parts)
    return _raw(StreamingResponse(body, status_code=start.status), headers)


async def _accepted(parts: Parts, wait_s: float) -> Accepted:
    try:
        accepted = await asyncio.wait_for(parts.__anext__(), wait_s)
    except asyncio.TimeoutError:
        raise ApiError(503, f"no replica was free for {wait_s:g} s: try again later") from None
    if not isinstance(accepted, Accepted):
        raise TypeError(f"expected a replica's name, got {type(accepted).__name__}")
    return accepted


async def _next(parts: Parts) -> bytes | None:
    """A piece of the body; None at its end."""
    part: Part | None = await anext(parts, None)
    if part is None or isinstance(part, bytes):
        return part
    raise TypeError(f"expected a piece of an answer, got {type(part).__name__}")


async def _body(
    path: str, headers: Headers, first: bytes, parts: Parts
) -> AsyncGenerator[bytes, None]:
    """The body's pieces; events that a replica's death ends say so in a last one.

    Raises:
        ReplicaLostError: in the middle of a body of another kind, whose client then sees the
            connection break.
    """
    piece: bytes | None = first
    try:
        while piece is not None:
            yield piece
            piece = await _next(parts)
    except ReplicaLostError as lost:
        _log.warning("%s, in the middle of an answer: %s", path, lost)
        if not _are_events(headers):
            raise
        yield _last_event(path)
    finally:
        await parts.aclose()


def _are_events(headers: Headers) -> bool:
    kind = dict(headers).get(b"content-type", b"")
    return kind.startswith(b"text/event-stream")


def _last_event(path: str) -> bytes:
    error = ApiError(502, "the replica died in the middle of the answer: ask again")
    if speaks_anthropic(path):
        return b"event: error\ndata: " + json.dumps(anthropic_body(error)).encode() + b"\n\n"
    return b"data: " + json.dumps(openai_body(error)).encode() + b"\n\n"


def _from_all(path: str, answers: list[Answer]) -> Response:
    """One answer of many: the best, or the metrics of all."""
    good = [answer for answer in answers if answer.start.status < 400]
    if not answers:
        raise ApiError(503, "no replica is ready")
    if good and path == "/metrics":
        texts = {answer.replica: answer.body.decode() for answer in good}
        return Response(metrics.merged(texts), media_type=metrics.CONTENT_TYPE)
    chosen = (good or answers)[0]
    return _raw(Response(chosen.body, status_code=chosen.start.status), chosen.start.headers)


def _raw(response: Response, headers: Iterable[tuple[bytes, bytes]]) -> Response:
    """The same with these headers, which may hold one name twice."""
    response.raw_headers = list(headers)
    return response
