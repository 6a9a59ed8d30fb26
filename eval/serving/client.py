"""Asks OpenAI-compatible servers for streamed answers, and notes when their pieces arrive."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx2

from hybrimoe_plugin.errors import HybriMoEError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GREEDY: Mapping[str, Any] = {
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}
TIMEOUT_S = 600.0
"""Longest silence of a server; the last of many clients waits for all the others' prompts."""


class AnswerError(HybriMoEError):
    """A server refused a request, or its answer is not whole."""


class Answer(NamedTuple):
    """One streamed answer. Times are those of `time.perf_counter`.

    Attributes:
        sent_s: when the request was sent.
        pieces_s: when each piece of text arrived; a server may hold a token's text back until it is
            a whole character.
        ended_s: when the answer's end arrived.
        reason: why it ended, such as `length`.
        tokens: of the answer, as the server counts them.
        cached_tokens: of the prompt, that needed no computation.
    """

    sent_s: float
    pieces_s: tuple[float, ...]
    ended_s: float
    text: str
    reason: str
    prompt_tokens: int
    tokens: int
    cached_tokens: int

    @property
    def first_token_s(self) -> float:
        """From the request to the first piece of text."""
        return self.pieces_s[0] - self.sent_s

    @property
    def token_s(self) -> float:
        """Mean time of a token after the first."""
        return (self.ended_s - self.pieces_s[0]) / max(1, self.tokens - 1)


class Round(NamedTuple):
    """What several clients were answered at once."""

    answers: list[Answer]

    @property
    def tokens_per_s(self) -> float:
        """All answers' tokens, over the time from the first request to the last answer's end."""
        began = min(answer.sent_s for answer in self.answers)
        ended = max(answer.ended_s for answer in self.answers)
        return sum(answer.tokens for answer in self.answers) / (ended - began)


class Server:
    """A server that runs.

    Args:
        url: without a path.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.model = self._model()

    def round(self, prompts: Iterable[Sequence[int]], clients: int, tokens: int) -> Round:
        """Let clients ask for completions, each for its next one when it has the one before.

        Args:
            prompts: token ids; each is asked for once, by the client that is free first.
            tokens: length of every answer, past any end of the text.

        Raises:
            AnswerError: of the first request that failed.
        """
        return asyncio.run(self._round(iter(prompts), clients, tokens))

    def talk(self, first: str, second: str, tokens: int) -> tuple[Answer, Answer]:
        """Two turns of a conversation.

        Args:
            tokens: length of each answer, past any end of the text.

        Raises:
            AnswerError: a request failed.
        """
        return asyncio.run(self._talk(first, second, tokens))

    def _model(self) -> str:
        try:
            answer = httpx2.get(f"{self.url}/v1/models", timeout=30, trust_env=False)
            found = answer.raise_for_status().json()
            return str(found["data"][0]["id"])
        except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
            raise AnswerError(f"{self.url} does not tell its model ({error})") from error

    async def _round(self, prompts: Iterator[Sequence[int]], clients: int, tokens: int) -> Round:
        answers: list[Answer] = []

        async def one(client: httpx2.AsyncClient) -> None:
            for prompt in prompts:  # all clients take from the same ones
                body = {"model": self.model, "prompt": list(prompt), **_length(tokens), **GREEDY}
                answers.append(await ask(client, COMPLETIONS, body))

        async with connect(self.url) as client:
            await asyncio.gather(*(one(client) for _ in range(clients)))
        return Round(answers)

    async def _talk(self, first: str, second: str, tokens: int) -> tuple[Answer, Answer]:
        messages = [{"role": "user", "content": first}]
        body = {"model": self.model, **_length(tokens), **GREEDY}
        async with connect(self.url) as client:
            opening = await ask(client, CHAT, {**body, "messages": messages})
            messages.append({"role": "assistant", "content": opening.text})
            messages.append({"role": "user", "content": second})
            return opening, await ask(client, CHAT, {**body, "messages": messages})


def _length(tokens: int) -> dict[str, Any]:
    """Fields for an answer of so many tokens; llama.cpp's server has no `min_tokens`."""
    return {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True}


def connect(url: str) -> httpx2.AsyncClient:
    """A client of any number of connections to one server.

    Each request has a connection of its own: llama.cpp's server may close one after an answer.
    """
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx2.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False)


async def ask(client: httpx2.AsyncClient, path: str, body: Mapping[str, Any]) -> Answer:
    """Ask for one streamed answer.

    Raises:
        AnswerError: it was refused, broke off, or holds no text.
    """
    heard = _Heard()
    sent = time.perf_counter()
    try:
        async with client.stream("POST", path, json=dict(body)) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode(errors="replace")
                raise AnswerError(f"{path}: status {response.status_code}: {said[:300]}")
            async for line in response.aiter_lines():
                heard.line(line)
    except httpx2.HTTPError as error:
        raise AnswerError(f"{path}: {type(error).__name__}: {error}") from error
    return heard.answer(sent)


class _Heard:
    """What has arrived of a stream of server-sent events."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._texts: list[str] = []
        self._usage: dict[str, Any] = {}
        self._ended_s: float | None = None
        self._reason = ""

    def line(self, line: str) -> None:
        """Take one line.

        Raises:
            AnswerError: the server says that it failed.
        """
        now = time.perf_counter()
        if not line.startswith("data:") or line == "data: [DONE]":
            return
        event = json.loads(line.removeprefix("data:"))
        if "error" in event:
            raise AnswerError(f"the answer broke off: {event['error']}")
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices", ()):
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if text:
                self._times.append(now)
                self._texts.append(text)
            if choice.get("finish_reason"):
                self._ended_s = now
                self._reason = choice["finish_reason"]

    def answer(self, sent_s: float) -> Answer:
        """The whole answer. Raises: AnswerError: it has no end, no text, or no usage."""
        if self._ended_s is None or not self._times or not self._usage:
            raise AnswerError(
                f"an answer of {len(self._times)} pieces "
                f"{'without an end' if self._ended_s is None else 'without text or usage'}"
            )
        details = self._usage.get("prompt_tokens_details") or {}
        return Answer(
            sent_s,
            tuple(self._times),
            self._ended_s,
            "".join(self._texts),
            self._reason,
            int(self._usage["prompt_tokens"]),
            int(self._usage["completion_tokens"]),
            int(details.get("cached_tokens") or 0),
        )
