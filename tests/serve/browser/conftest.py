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
import streamed_chat
import uvicorn
from loading import injected
from playwright.sync_api import Browser, Page, sync_playwright
from scripted_scheduler import ScriptedScheduler, ScriptedTicket
from tiny import write

from hybrimoe_plugin.serve.api.app import build_app
from hybrimoe_plugin.serve.live import routes as live
from hybrimoe_plugin.serve.page import routes as page_routes
from hybrimoe_plugin.serve.requests import Request, Sink
from hybrimoe_plugin.serve.service import Service

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Told(ScriptedScheduler):
    """Answers each request with the text that a test has set, and keeps its ticket."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, "", seconds_per_token=0.001)
        self.tokenizer = tokenizer
        self.tickets: list[ScriptedTicket] = []

    def say(self, text: str, seconds_per_token: float = 0.001) -> None:
        self._ids = self.tokenizer.encode(text)
        self._seconds = seconds_per_token

    def submit(self, request: Request, sink: Sink) -> ScriptedTicket:
        ticket = super().submit(request, sink)
        self.tickets.append(ticket)
        return ticket

    def asked(self) -> str:
        """What the newest request's messages are, as JSON."""
        return str(self.tokenizer.decode(list(self.requests[-1].prompt)))


@dataclass
class Site:
    """A running server."""

    url: str
    scheduler: Told
    service: Service


@pytest.fixture(scope="session")
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
    changes = None
    if os.environ.get("HYBRIMOE_SCREENSHOTS"):
        changes = {"num_hidden_layers": 24, "num_experts": 64, "moe_intermediate_size": 128}
    path = write(tmp_path_factory.mktemp("tiny"), "qwen3_moe", changes=changes)
    made = injected(path, accelerator="emulated", cache_ratio=0.25)
    yield made
    made.hybrimoe.close()


@pytest.fixture
def site(model: Any) -> Iterator[Site]:
    """A server of the page, the feed and a stand-in for the chat."""
    yield from served(model)


@pytest.fixture
def plain_site() -> Iterator[Site]:
    """The same of a model without experts."""
    yield from served(object())


def served(model: Any) -> Iterator[Site]:
    tokenizer = streamed_chat.PieceTokenizer()
    scheduler = Told(tokenizer)
    service = Service(model, tokenizer, "tiny-moe", scheduler)
    routers = [part.router(service) for part in (streamed_chat, live, page_routes)]
    config = uvicorn.Config(build_app(service, routers), log_level="warning")
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

    def make(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        return page

    yield make
    for context in contexts:
        context.close()
    assert errors == []
