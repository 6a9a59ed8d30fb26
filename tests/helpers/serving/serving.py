"""Real servers with a scripted scheduler: in a thread, or (run as a program) in a process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

if __name__ == "__main__":  # as a program, it has no conftest
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fakes"))

from scripted_scheduler import ScriptedScheduler

from hybrimoe_plugin.serve import requests
from hybrimoe_plugin.serve.api import metrics, models, status
from hybrimoe_plugin.serve.api.app import build_app
from hybrimoe_plugin.serve.http.layers import Access, surround
from hybrimoe_plugin.serve.http.server import Server, listen
from hybrimoe_plugin.serve.service import Service

TEXT = "an answer of some length"
DONE = "[DONE]"


class Letters:
    """A tokenizer: each character is a token."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) for letter in text]


class _Queue:
    """A sink that hands over to a coroutine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[Any] = asyncio.Queue()

    def started(self, cached_tokens: int) -> None: ...

    def put(self, token: requests.Token) -> bool:
        if chr(token.id) != TEXT[0]:
            _hold()
        self._loop.call_soon_threadsafe(self.items.put_nowait, chr(token.id))
        return True

    def end(self, end: requests.End) -> None:
        self._loop.call_soon_threadsafe(self.items.put_nowait, end)


def _hold() -> None:
    """Let an answer go on when the file is there that this variable names."""
    file = os.environ.get("HOLD_UNTIL")
    while file is not None and not Path(file).exists():
        time.sleep(0.01)


def streaming(service: Service) -> APIRouter:
    """`POST /v1/stream` answers by server-sent events; `POST /v1/echo` by the body's size."""
    routes = APIRouter()

    @routes.post("/v1/stream")
    async def stream(request: Request) -> StreamingResponse:
        await request.json()
        sink = _Queue()
        service.scheduler.submit(requests.Request("r", (1,)), sink)
        request.state.tokens = (1, len(TEXT))
        return StreamingResponse(_events(sink), media_type="text/event-stream")

    @routes.post("/v1/echo")
    async def echo(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @routes.post("/v1/bug")
    async def bug(request: Request) -> None:
        raise ZeroDivisionError("secret words of a prompt")

    return routes


async def _events(sink: _Queue) -> AsyncIterator[str]:
    while True:
        item = await sink.items.get()
        if isinstance(item, requests.End):
            yield f"data: {item.reason.value}\n\ndata: {DONE}\n\n"
            return
        yield f"data: {json.dumps(item)}\n\n"


def light_routers(service: Service) -> list[APIRouter]:
    """The endpoints that import neither torch nor transformers, and those above."""
    endpoints = (models.router, status.router, metrics.router, streaming)
    return [endpoint(service) for endpoint in endpoints]


def scripted(seconds_per_token: float = 0.0) -> Service:
    """A service without a model."""
    scheduler = ScriptedScheduler(Letters(), TEXT, seconds_per_token)
    return Service(None, Letters(), "org/some-model", scheduler)


@contextmanager
def served(
    service: Service,
    access: Access,
    seconds: float = 5.0,
    routers: Sequence[APIRouter] | None = None,
) -> Iterator[int]:
    """The port of a server in a thread; of light endpoints, where no others are given."""
    app = build_app(service, light_routers(service) if routers is None else routers)
    surround(app, service, access)
    port = listen("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(app, service, seconds, ready.set)
    thread = threading.Thread(target=server.run, args=([port],), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield port.getsockname()[1]
    finally:
        if not service.closing:
            server.close()
        thread.join(30)
        port.close()
        assert not thread.is_alive()


def main() -> int:
    """The command `serve` with everything but the model; arguments as of `hybrimoe`."""
    from hybrimoe_plugin.cli.chat import loading
    from hybrimoe_plugin.cli.main import main as hybrimoe
    from hybrimoe_plugin.cli.serve import command

    per_token = float(sys.argv[1])
    model = SimpleNamespace(config=SimpleNamespace(model_type="scripted"))
    loaded = command.Loaded(model, Letters(), 1, None, ["a scripted model"])

    @contextmanager
    def no_model(*_args: object) -> Iterator[command.Loaded]:
        yield loaded

    def scheduler(*_args: object, **_options: object) -> ScriptedScheduler:
        return ScriptedScheduler(Letters(), TEXT, per_token)

    patched: Any = command
    patched._loaded = no_model
    patched.make_scheduler = scheduler
    vars(loading)["check_machine"] = lambda _choice: None
    routers = ModuleType("hybrimoe_plugin.serve.routers")
    vars(routers)["all_routers"] = light_routers
    sys.modules[routers.__name__] = routers
    return hybrimoe(sys.argv[2:])


def wait_until(is_so: Any, seconds: float = 30.0) -> None:
    """Poll until something is so."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it never was"
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
