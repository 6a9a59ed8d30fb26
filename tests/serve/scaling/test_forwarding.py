"""The ingress: which replica is asked, when again, and what a client is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from hybrimoe_plugin.serve.requests import QueueFullError
from hybrimoe_plugin.serve.scaling import in_process
from hybrimoe_plugin.serve.scaling.forwarding import Forwarding, ingress
from hybrimoe_plugin.serve.scaling.messages import (
    Accepted,
    Answer,
    Call,
    Parts,
    ReplicaLostError,
    Start,
)

JSON = ((b"content-type", b"application/json"),)
EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"),)
GOOD = [Accepted("a"), Start(200, JSON), b"{}"]
DEAD = [Accepted("a"), ReplicaLostError("dead")]
CHAT = "/v1/chat/completions"


class Scripted:
    """Implements `Replicas`: each request is answered by the next script.

    Attributes:
        keys: of the requests.
        closed: answers that were taken or given up.
    """

    def __init__(self, *scripts: list[Any], answers: list[Answer] | None = None) -> None:
        self.keys: list[str | None] = []
        self.closed = 0
        self._scripts = list(scripts)
        self._answers = answers or []

    async def send(self, call: Call, key: str | None) -> Parts:
        self.keys.append(key)
        try:
            for part in self._scripts.pop(0):
                if isinstance(part, Exception):
                    raise part
                if isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    yield part
        finally:
            self.closed += 1

    async def ask_all(self, call: Call) -> list[Answer]:
        return self._answers


def ask(
    replicas: Scripted,
    path: str = CHAT,
    body: bytes = b'{"prompt": "a"}',
    method: str = "POST",
    limits: Forwarding | None = None,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> tuple[Start, bytes]:
    """What a client gets; an answer that breaks off raises."""

    app = ingress(replicas, limits or Forwarding())

    async def run() -> tuple[Start, bytes]:
        asked = Call(method, path, b"", headers, body)
        start, *pieces = [part async for part in in_process.answer(app, asked)]
        assert isinstance(start, Start)
        return start, b"".join(piece for piece in pieces if isinstance(piece, bytes))

    return asyncio.run(run())


def test_an_answer_passes_unchanged() -> None:
    cookies = ((b"set-cookie", b"a"), (b"set-cookie", b"b"))
    named = (b"x-request-id", b"1")  # the proxy adds it
    replicas = Scripted([Accepted("a"), Start(201, (*JSON, named, *cookies)), b"one", b"two"])
    start, body = ask(replicas)
    assert (start.status, body) == (201, b"onetwo")
    assert start.headers == (*JSON, *cookies, (b"x-replica", b"a"))
    assert replicas.closed == 1


def test_an_answer_without_a_body_passes() -> None:
    start, body = ask(Scripted([Accepted("a"), Start(204, ())]))
    assert (start.status, body) == (204, b"")


def test_the_session_is_the_clients_or_the_bodys() -> None:
    replicas = Scripted(GOOD, GOOD, GOOD)
    ask(replicas)
    ask(replicas, headers=((b"x-session-id", b"me"),))
    ask(replicas, method="GET", path="/", body=b"")
    assert replicas.keys[0] != replicas.keys[1]
    assert replicas.keys[2] is None


@pytest.mark.parametrize("lost", [[ReplicaLostError("dead")], DEAD, [*GOOD[:2], DEAD[-1]]])
def test_before_the_first_byte_another_replica_is_asked(lost: list[Any]) -> None:
    replicas = Scripted(lost, GOOD)
    start, body = ask(replicas)
    assert (start.status, body) == (200, b"{}")
    assert replicas.keys[0] == replicas.keys[1]


def test_a_request_that_kills_replicas_is_given_up() -> None:
    replicas = Scripted(DEAD, DEAD, GOOD)
    start, body = ask(replicas)
    assert start.status == 502
    assert "died" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "first", "where"),
    [
        (CHAT, b"data: ", lambda told: told["error"]),
        ("/v1/messages", b"event: error\ndata: ", lambda told: told["error"]),
    ],
)
def test_events_that_break_off_end_with_an_error(
    path: str, first: bytes, where: Callable[[Any], Any]
) -> None:
    replicas = Scripted([Accepted("a"), Start(200, EVENTS), b"data: 1\n\n", DEAD[-1]])
    start, body = ask(replicas, path)
    assert start.status == 200
    event = body.removeprefix(b"data: 1\n\n")
    assert event.startswith(first)
    assert event.endswith(b"\n\n")
    told = where(json.loads(event.removeprefix(first)))
    assert told["type"] == "api_error"
    assert "ask again" in told["message"]


def test_another_body_that_breaks_off_breaks_the_connection() -> None:
    replicas = Scripted([Accepted("a"), Start(200, JSON), b"{", DEAD[-1]])
    with pytest.raises(RuntimeError, match="before its answer"):
        ask(replicas)


@pytest.mark.parametrize(
    ("script", "status", "kind"),
    [
        ([QueueFullError("full")], 429, "rate_limit_error"),
        ([10.0], 503, "overloaded_error"),
    ],
)
def test_a_request_for_which_there_is_no_room_is_refused(
    script: list[Any], status: int, kind: str
) -> None:
    replicas = Scripted(script)
    start, body = ask(replicas, limits=Forwarding(wait_s=0.01))
    assert start.status == status
    assert json.loads(body)["error"]["type"] == kind
    assert (b"retry-after", b"1") in start.headers
    assert replicas.closed == 1


def test_only_waiting_is_limited_and_not_the_answer() -> None:
    slow = [Accepted("a"), 0.05, Start(200, JSON), b"{}"]
    start, _ = ask(Scripted(slow), limits=Forwarding(wait_s=0.02))
    assert start.status == 200


def test_the_best_answer_of_all_is_their_health() -> None:
    ill, well = Start(503, JSON), Start(200, JSON)
    answers = [Answer("a", ill, b"ill"), Answer("b", well, b"well")]
    assert ask(Scripted(answers=answers), "/health", b"", "GET") == (well, b"well")
    assert ask(Scripted(answers=answers[:1]), "/health", b"", "GET") == (ill, b"ill")


def test_no_replica_is_no_health() -> None:
    start, _ = ask(Scripted(), "/health", b"", "GET")
    assert start.status == 503


def test_metrics_are_those_of_all() -> None:
    start = Start(200, ())
    answers = [Answer("a", start, b"x 1.0\n"), Answer("b", start, b"x 2.0\n")]
    told, body = ask(Scripted(answers=answers), "/metrics", b"", "GET")
    assert told.status == 200
    assert b'x{replica="a"} 1.0' in body
    assert b'x{replica="b"} 2.0' in body
