"""Keys: who has one is served, whoever has none learns nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from asking import ask
from serving import scripted, served

from hybrimoe_plugin.serve.http.layers import Access

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(scripted(), Access("127.0.0.1", KEYS, ["https://page.example"])) as found:
        yield found


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer  second-key"},
        {"x-api-key": "second-key"},
    ],
)
def test_each_key_is_taken_from_either_header(headers: dict[str, str], port: int) -> None:
    assert ask(port, "/v1/models", headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer first-ke"},
        {"authorization": "Bearer first-key-and-more"},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
        {"x-api-key": ""},
        {"x-api-key": "first-key,second-key"},
        {"x-api-key": "f\xedrst-key"},
    ],
)
def test_others_are_refused(headers: dict[str, str], port: int) -> None:
    answer = ask(port, "/v1/models", headers)
    assert answer.status == 401
    assert answer.json["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_without_a_key_no_body_is_read_and_no_path_is_told_from_another(port: int) -> None:
    for path in ("/v1/echo", "/none", "/metrics", "/version", "//", "/health/"):
        assert ask(port, path, body=b"x" * 10_000).status == 401


def test_health_and_the_pages_files_need_none(port: int) -> None:
    assert ask(port, "/health").status == 200
    for path in ("/", "/page/page.js"):
        assert ask(port, path).status in (200, 404)


def test_the_anthropic_path_has_the_anthropic_form(port: int) -> None:
    answer = ask(port, "/v1/messages", body={})
    assert (answer.status, answer.json["type"]) == (401, "error")
    assert answer.json["error"]["type"] == "authentication_error"


def test_a_browser_may_ask_without_a_key_whether_it_may_ask(port: int) -> None:
    headers = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = ask(port, "/v1/chat/completions", headers, method="OPTIONS")
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    other = ask(port, "/v1/models", {"origin": "https://other.example"})
    assert other.status == 401 and "access-control-allow-origin" not in other.headers
