"""Servers of one answer: a test file's `ANSWER`, or a text that thinks and calls a tool."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from more_apis_server import THINKS_AND_CALLS, Served, serving


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serving(request.module.ANSWER) as made:
        yield made


@pytest.fixture
def served(server: Served) -> Iterator[Served]:
    yield server
    server.calm()


@pytest.fixture(scope="module")
def caller(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serving(THINKS_AND_CALLS) as made:
        made.scheduler.cached_tokens = getattr(request.module, "CACHED", 0)
        yield made
