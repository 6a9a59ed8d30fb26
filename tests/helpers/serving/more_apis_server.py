"""A real server of Messages and Responses before a scripted scheduler."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
from openai_server import NAME, Talk, talking

from hybrimoe_plugin.serve.api import messages, responses

THINKS_AND_CALLS = (
    "<think>\nA sum.\n</think>\n\nLet me add.\n"
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call>'
)
"""An answer with everything, as Qwen's models write it."""
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
"""A tool of Messages."""
ADD_FUNCTION = {"type": "function", "name": "add", "parameters": SCHEMA, "strict": False}
"""A tool of Responses."""


class Served(Talk):
    """Both APIs' own clients for a server that says the same to everybody."""

    def __init__(self, talk: Talk) -> None:
        super().__init__(talk.service, talk.url)
        self.anthropic = anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0)

    def asked(self, **options: Any) -> dict[str, Any]:
        """Arguments of a question to Messages."""
        messages = [{"role": "user", "content": "hello"}]
        return {"model": NAME, "max_tokens": 1000, "messages": messages, **options}

    def message(self, **options: Any) -> Any:
        """One question to Messages."""
        made: Any = self.anthropic.messages
        return made.create(**self.asked(**options))

    def respond(self, **options: Any) -> Any:
        """One question to Responses."""
        made: Any = self.client.responses
        return made.create(**{"model": NAME, "input": "hello", **options})

    def calm(self) -> None:
        """Undo what a test did to the scheduler."""
        self.scheduler.full = False
        self.scheduler.error = None
        self.scheduler.cached_tokens = 0

    def send(self, path: str, body: Any) -> tuple[int, str]:
        """Status and text of the answer to any JSON, or to bytes."""
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = self.connection()
        try:
            connection.request("POST", path, sent, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()


@contextmanager
def serving(text: str, **options: Any) -> Iterator[Served]:
    """A server whose every answer is this text; options are those of `talking`."""
    with talking(text, endpoints=(messages, responses), **options) as talk:
        yield Served(talk)
