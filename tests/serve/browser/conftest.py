"""A real server in a thread, and a real Chromium without a window."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from byte_language import byte_tokenizer, named_model
from fastapi import APIRouter
from loading import injected
from playwright.sync_api import Browser, Page, expect, sync_playwright
from scripted_scheduler import ScriptedScheduler
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from tiny import write

from hybrimoe_plugin.serve.api import chat_completions
from hybrimoe_plugin.serve.api.app import build_app
from hybrimoe_plugin.serve.live import routes as live
from hybrimoe_plugin.serve.page import routes as page_routes
from hybrimoe_plugin.serve.service import Service

expect.set_options(timeout=30_000)  # two cores and many tests at once

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Told(ScriptedScheduler):
    """Answers each request with the text that a test has set."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, "")
        self.tokenizer = tokenizer

    def say(self, text: str, seconds_per_token: float = 0.0) -> None:
        """A token is a byte."""
        self._ids = self.tokenizer.encode(text, add_special_tokens=False)
        self._seconds = seconds_per_token

    def asked(self) -> str:
        """The newest request's prompt."""
        return str(self.tokenizer.decode(list(self.requests[-1].prompt)))


@dataclass
class Site:
    """A running server."""

    url: str
    scheduler: Told
    service: Service


@pytest.fixture(scope="module")  # its event loop runs until then: no other test could have one
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        assert not os.environ.get("CI"), f"{CHROMIUM} is not there"
        pytest.skip(f"{CHROMIUM} is not there")
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield found
        found.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny model whose accelerator is emulated; for pictures one with more experts."""
    changes = {"vocab_size": 264}
    if os.environ.get("HYBRIMOE_SCREENSHOTS"):
        changes |= {"num_hidden_layers": 24, "num_experts": 64, "moe_intermediate_size": 128}
    path = write(tmp_path_factory.mktemp("tiny"), "qwen3_moe", changes=changes)
    made = injected(path, accelerator="emulated", cache_ratio=0.25)
    yield made
    made.hybrimoe.close()


@pytest.fixture
def site(model: Any) -> Iterator[Site]:
    """A server of the page, the feed and the chat."""
    yield from served(model)


@pytest.fixture
def locked_site(model: Any) -> Iterator[Site]:
    """The same where all but the page itself needs a key."""
    yield from served(model, Locked)


class Locked:
    """Wants the key `secret`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "/")
        has_key = (b"authorization", b"Bearer secret") in scope.get("headers", ())
        if has_key or path == "/" or path.startswith("/page/"):
            await self.app(scope, receive, send)
            return
        error = {"error": {"message": "this server needs a key"}}
        await JSONResponse(error, 401)(scope, receive, send)


@pytest.fixture
def plain_site() -> Iterator[Site]:
    """The same of a model without experts."""
    yield from served(named_model())


def models(service: Service) -> APIRouter:
    """A stand-in: the model's name."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.name, "object": "model"}]}

    return routes


def served(model: Any, around: Callable[[ASGIApp], ASGIApp] = lambda app: app) -> Iterator[Site]:
    tokenizer = byte_tokenizer()
    scheduler = Told(tokenizer)
    service = Service(model, tokenizer, "tiny-moe", scheduler)
    parts = (models, chat_completions.router, live.router, page_routes.router)
    app = build_app(service, [part(service) for part in parts])
    config = uvicorn.Config(around(app), log_level="warning")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield Site(f"http://127.0.0.1:{port}", scheduler, service)
        finally:
            service.closing = server.should_exit = True
            thread.join()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages; an error of theirs, or one on the console, fails the test."""
    errors: list[str] = []
    contexts = []

    def make(url: str, forgiven: str = "", **options: Any) -> Page:
        def heard(text: str) -> None:
            if not forgiven or forgiven not in text:
                errors.append(text)

        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: heard(str(error)))
        page.on("console", lambda said: said.type == "error" and heard(said.text))
        page.on("dialog", lambda dialog: (heard(dialog.message), dialog.dismiss()))
        page.goto(url)
        return page

    yield make
    for context in contexts:
        context.close()
    assert errors == []
