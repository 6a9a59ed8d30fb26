"""Ids, the log, names of the host, errors, health and models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from asking import ask, head, raw
from serving import TEXT, scripted, served, wait_until

from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.serve.http.hosts import is_local, without_port
from hybrimoe_plugin.serve.http.ids import RequestIds, access, request_id
from hybrimoe_plugin.serve.http.layers import Access
from hybrimoe_plugin.serve.service import Service


@pytest.fixture(scope="module")
def service() -> Service:
    return scripted()


@pytest.fixture(scope="module")
def port(service: Service) -> Iterator[int]:
    with served(service, Access("127.0.0.1", origins=["*"])) as found:
        yield found


def test_a_sane_id_is_kept_and_any_other_replaced(port: int) -> None:
    assert ask(port, "/health", {"x-request-id": "mine-1:2"}).headers["x-request-id"] == "mine-1:2"
    made = set()
    for given in ({}, {"x-request-id": "a b"}, {"x-request-id": "x" * 129}):
        made.add(ask(port, "/health", given).headers["x-request-id"])
    assert len(made) == 3 and all(name.startswith("req-") for name in made)


@pytest.mark.parametrize("given", [b"", b"a\x1b[2J", b"a\nb", "ü".encode(), b"a/b", b"a;b"])
def test_no_id_can_write_into_the_log(given: bytes) -> None:
    assert request_id(given).startswith("req-")


def test_a_request_has_one_line_without_its_prompt(
    port: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "level", logging.INFO)
    monkeypatch.setattr(access, "_cache", {})
    headers = {"x-request-id": "id1", "authorization": "Bearer a-key"}
    ask(port, "/v1/stream?q=query", headers, {"prompt": "a secret"})
    wait_until(lambda: "id1" in caplog.text)
    lines = [record.getMessage() for record in caplog.records if record.name == access.name]
    assert len(lines) == 1
    assert lines[0].startswith("id1 POST /v1/stream 200 ")
    assert lines[0].endswith(f" s 1 + {len(TEXT)} tokens")
    for secret in ("secret", "a-key", "query"):
        assert secret not in caplog.text


def test_a_path_cannot_write_into_the_log(
    port: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "level", logging.INFO)
    monkeypatch.setattr(access, "_cache", {})
    ask(port, "/a%0Ahybrimoe:%20fake%1B[2J", {"x-request-id": "id2"})
    wait_until(lambda: "id2" in caplog.text)
    assert "GET /a hybrimoe: fake\\x1b[2J 404" in caplog.text


def test_a_bug_is_an_answer_that_says_nothing_of_the_request(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    answer = ask(port, "/v1/bug", {"x-request-id": "id3"}, {})
    assert (answer.status, answer.json["error"]["type"]) == (500, "api_error")
    assert answer.headers["x-request-id"] == "id3"
    assert "secret" not in answer.text
    assert "request id3 failed: ZeroDivisionError (serving.py:" in caplog.text


@pytest.mark.parametrize(
    ("path", "body", "status"), [("/none", None, 404), ("/v1/models", {}, 405), ("/a/", {}, 404)]
)
def test_errors_of_the_router_have_openais_form(
    path: str, body: Any, status: int, port: int
) -> None:
    answer = ask(port, path, body=body)
    assert answer.status == answer.json["error"]["code"] == status
    assert path in answer.json["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"])
def test_local_names_are_served(host: str, port: int) -> None:
    assert ask(port, "/health", {"host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "[::2]"]
)
def test_a_page_cannot_reach_a_local_server_by_its_own_name(host: str, port: int) -> None:
    answer = ask(port, "/health", {"host": host})
    assert (answer.status, answer.json["error"]["type"]) == (403, "permission_error")


def test_a_request_for_a_whole_address_counts_by_its_host(port: int) -> None:
    sent = head("http://evil.example/health", "connection: close", method="GET")
    assert not raw(port, sent).startswith(b"HTTP/1.1 200")


def test_which_addresses_are_local() -> None:
    assert all(map(is_local, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_local, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
    assert without_port("[::1]") == "::1" and without_port("a") == "a"


def test_every_origin_may_ask_where_that_was_asked_for(port: int) -> None:
    answer = ask(port, "/v1/models", {"origin": "https://any.example"})
    assert answer.headers["access-control-allow-origin"] == "*"


def test_without_cors_no_other_page_may_read_an_answer() -> None:
    with served(scripted(), Access("127.0.0.1")) as port:
        answer = ask(port, "/v1/models", {"origin": "https://any.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_model_is_listed_and_found_by_its_name(service: Service, port: int) -> None:
    entry = ask(port, "/v1/models").json["data"][0]
    assert entry["id"] == service.name and entry["max_model_len"] == 2048
    assert ask(port, f"/v1/models/{service.name}").json == entry
    missing = ask(port, "/v1/models/other")
    assert missing.status == 404 and missing.json["error"]["param"] == "model"


def test_health_says_why_no_answer_can_come() -> None:
    service = scripted()
    scheduler: Any = service.scheduler
    with served(service, Access("127.0.0.1")) as port:
        scheduler.failed = BackendError("the file was truncated")
        answer = ask(port, "/health")
        assert answer.status == 503
        assert answer.json == {"status": "failed", "reason": "the file was truncated"}


def test_a_server_that_answers_one_at_a_time_says_so() -> None:
    service = scripted()
    scheduler: Any = service.scheduler
    scheduler.together = False
    with served(service, Access("127.0.0.1")) as port:
        assert ask(port, "/v1/models").headers["x-hybrimoe-batching"] == "off"


def test_what_an_answer_says_itself_is_not_said_twice() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        own = [(b"request-id", b"its-own"), (b"x-hybrimoe-batching", b"queued")]
        await send({"type": "http.response.start", "status": 200, "headers": own})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    sent: list[Any] = []
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-request-id", b"mine")]}
    layer = RequestIds(app, {"x-hybrimoe-batching": "off"})
    asyncio.run(layer(scope, None, send))  # type: ignore[arg-type]
    assert sent[0]["headers"] == [
        (b"request-id", b"its-own"),
        (b"x-hybrimoe-batching", b"queued"),
        (b"x-request-id", b"mine"),
    ]
