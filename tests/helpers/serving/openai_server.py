"""A real server in a thread, before a scripted scheduler, and OpenAI's own client for it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn
from byte_language import byte_tokenizer, named_model
from scripted_scheduler import ScriptedScheduler

from hybrimoe_plugin.serve.api import chat_completions, completions
from hybrimoe_plugin.serve.api.app import build_app
from hybrimoe_plugin.serve.service import Limits, Service

NAME = "org/some-model"


class Talk:
    """A server that says the same to everybody.

    Attributes:
        scheduler: its `requests` are what reached it.
        url: without a slash at the end.
    """

    def __init__(self, service: Service, url: str) -> None:
        self.service = service
        self.scheduler: Any = service.scheduler
        self.url = url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def chat(self, text: str = "hello", **options: Any) -> Any:
        """One question to chat completions."""
        messages = options.pop("messages", [{"role": "user", "content": text}])
        made: Any = self.client.chat.completions
        return made.create(model=NAME, messages=messages, **options)

    def complete(self, prompt: Any = "hello", **options: Any) -> Any:
        made: Any = self.client.completions
        return made.create(model=NAME, prompt=prompt, **options)

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of the answer to whatever a client may send."""
        connection = self.connection()
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        found = json.loads(answer.read())
        connection.close()
        return answer.status, found

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)

    def prompt(self) -> str:
        """The last one that reached the scheduler, as text."""
        return str(self.service.tokenizer.decode(self.scheduler.requests[-1].prompt))

    def sampling(self) -> Any:
        return self.scheduler.requests[-1].sampling


@contextmanager
def talking(
    text: str,
    seconds_per_token: float = 0.0,
    model: Any = None,
    tokenizer: Any = None,
    limits: Limits | None = None,
    endpoints: Sequence[Any] = (chat_completions, completions),
) -> Iterator[Talk]:
    """A server whose every answer is this text, with the routers of these modules."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    model = named_model() if model is None else model
    scheduler = ScriptedScheduler(tokenizer, text, seconds_per_token)
    service = Service(model, tokenizer, NAME, scheduler, limits or Limits())
    app = build_app(service, [endpoint.router(service) for endpoint in endpoints])
    with socket.create_server(("127.0.0.1", 0)) as port:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield Talk(service, f"http://127.0.0.1:{port.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(30)
            service.language.prompts.close()


def wait_until(is_so: Callable[[], Any], seconds: float = 30.0) -> None:
    """Poll until something is so."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it never was"
        time.sleep(0.01)
