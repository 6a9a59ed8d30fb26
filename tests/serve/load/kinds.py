"""What clients do, and whether what they get is right."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx2

from eval.serving.client import ask
from tests.serve.load import wire
from tests.serve.load.world import CHAT, CONTEXT, LENGTH, Question

PATIENCE = 0.05
"""Seconds that those who leave wait at most."""
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["one", "two"]}, "sure": {"type": "boolean"}},
    "required": ["kind", "sure"],
    "additionalProperties": False,
}
GREEDY = {"temperature": 0, "max_tokens": LENGTH}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


class Client:
    """One client's means, and what it asks about.

    Args:
        port: of the server.
        drawn: the client's own random numbers.
        seeded: (question's place, seed) -> what a seeded answer was when it was alone.
    """

    def __init__(
        self,
        http: httpx2.AsyncClient,
        port: int,
        drawn: random.Random,
        seeded: dict[tuple[str, int], str],
    ) -> None:
        self.http = http
        self.port = port
        self.drawn = drawn
        self.seeded = seeded

    async def post(self, question: Question, status: int = 200, **options: Any) -> Any:
        """The answer's JSON, whose status must be this one."""
        answer = await self.http.post(question.path, json={**question.body, **options})
        same("status", answer.status_code, status)
        return answer.json()


Kind = Callable[[Client, Question], Awaitable[None]]


class WrongError(Exception):
    """A client got something else than the right answer."""


def same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise WrongError(f"{what}: {found!r} in place of {wanted!r}")


def texts(answer: Any) -> list[str]:
    """The texts of an answer's choices."""
    return [
        choice["text"] if "text" in choice else choice["message"]["content"]
        for choice in answer["choices"]
    ]


def said(events: Sequence[Any]) -> str:
    """The text of a stream with one choice."""
    choices = [choice for event in events for choice in event["choices"]]
    heard = [choice.get("text") or choice.get("delta", {}).get("content") for choice in choices]
    return "".join(text or "" for text in heard)


async def stream(client: Client, question: Question) -> None:
    answer = await ask(client.http, question.path, {**question.body, **GREEDY, **STREAM})
    same("text", answer.text, question.text)
    same("end", (answer.reason, answer.tokens), ("length", LENGTH))


async def whole(client: Client, question: Question) -> None:
    answer = await client.post(question, **GREEDY)
    same("texts", texts(answer), [question.text])
    same("tokens", answer["usage"]["completion_tokens"], LENGTH)


async def short(client: Client, question: Question) -> None:
    tokens = client.drawn.randint(1, LENGTH - 1)
    answer = await client.post(question, temperature=0, max_tokens=tokens)
    same("texts", texts(answer), [question.text[:tokens]])


async def stop(client: Client, question: Question) -> None:
    """The stop string spans two tokens, of which the first one must be held back."""
    at = client.drawn.randint(0, LENGTH - 2)
    sign = question.text[at : at + 2]
    body = {**question.body, **GREEDY, **STREAM, "stop": [sign, "\n\n"]}
    answer = await client.http.post(question.path, json=body)
    same("status", answer.status_code, 200)
    events = wire.events(answer.content)
    same("text", said(events), question.text.partition(sign)[0])
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    same("end", reasons[-1], "stop")


async def two(client: Client, question: Question) -> None:
    answer = await client.post(question, **GREEDY, n=2)
    same("texts", texts(answer), [question.text] * 2)
    same("places", [choice["index"] for choice in answer["choices"]], [0, 1])


async def seeded(client: Client, question: Question) -> None:
    """Drawn by a seed: the same as alone."""
    seed = client.drawn.randint(0, 1)
    answer = await client.post(question, temperature=0.8, max_tokens=LENGTH, seed=seed)
    (text,) = texts(answer)
    same("text", text, client.seeded[question.text, seed])


async def schema(client: Client, question: Question) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "found", "schema": SCHEMA}}
    answer = await client.post(question, temperature=0, max_tokens=200, response_format=form)
    (text,) = texts(answer)
    found = json.loads(text)
    same("fields", (sorted(found), type(found["sure"])), (["kind", "sure"], bool))
    same("kind", found["kind"] in ("one", "two"), True)


async def leave_at_once(client: Client, question: Question) -> None:
    body = {**question.body, **GREEDY, "stream": client.drawn.random() < 0.5}
    wait, rude = PATIENCE * client.drawn.random(), client.drawn.random() < 0.5
    await wire.leave(client.port, question.path, body, wait, rude)


async def leave_later(client: Client, question: Question) -> None:
    """Leave in the middle of a stream; what has come is the answer's beginning."""
    pieces = client.drawn.randint(1, LENGTH // 2)
    heard = ""
    body = {**question.body, "temperature": 0, "max_tokens": 300, "stream": True}
    async with client.http.stream("POST", question.path, json=body) as answer:
        same("status", answer.status_code, 200)
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                heard += said([json.loads(line.removeprefix("data:"))])
            if len(heard) >= pieces:
                break
    same("beginning", heard[:LENGTH], question.text[: len(heard)])


async def stop_talking(client: Client, question: Question) -> None:
    wait = PATIENCE * client.drawn.random()
    await wire.stop_talking(client.port, question.path, {**question.body, **GREEDY}, wait)


def _probabilities(question: Question) -> dict[str, Any]:
    """Fields that ask for as many as may be told."""
    if question.path == CHAT:
        return {"logprobs": True, "top_logprobs": 20}
    return {"logprobs": 20}


async def read_slowly(client: Client, question: Question) -> None:
    """Every token comes with many others' probabilities, more than a connection holds."""
    body = {**question.body, **GREEDY, **STREAM, **_probabilities(question)}
    answer = await wire.read_slowly(client.port, question.path, body, 0.01)
    same("text", said(wire.events(answer)), question.text)


async def read_nothing(client: Client, question: Question) -> None:
    """Ask for a long stream, and leave when it must have filled the connection."""
    body = {**question.body, "temperature": 0, "stream": True}
    body |= _probabilities(question) | {"max_tokens": 100}
    await wire.leave(client.port, question.path, body, 20 * PATIENCE, rude=True)


async def bad_body(client: Client, question: Question) -> None:
    """Refused with a reason."""
    change = client.drawn.choice(BAD)
    body = json.dumps({**question.body, **change}).encode() if change else b'{"prompt": "half'
    kind = {"content-type": "application/json"}
    answer = await client.http.post(question.path, content=body, headers=kind)
    same(f"class of status for {change}", answer.status_code // 100, 4)
    same("reason", bool(answer.json()["error"]["message"]), True)


async def look(client: Client, question: Question) -> None:
    """What monitors ask in between."""
    for path in ("/health", "/v1/models", "/metrics"):
        answer = await client.http.get(path)
        same(path, answer.status_code, 200)


BAD: tuple[dict[str, Any], ...] = (
    {},
    {"max_tokens": -1},
    {"max_tokens": "many"},
    {"temperature": 1e9},
    {"temperature": True},
    {"top_p": 0},
    {"n": 0},
    {"n": 1000},
    {"stop": 5},
    {"stop": [""]},
    {"logit_bias": {"no token": 1}},
    {"seed": 1.5},
    {"stream": "yes"},
    {"model": "another"},
    {"messages": [], "prompt": []},
    {"messages": "hello", "prompt": {"a": 1}},
    {"messages": [{"role": "user", "content": "x" * 4 * CONTEXT}], "prompt": "x" * 4 * CONTEXT},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}},
)

SHARES: dict[Kind, int] = {
    stream: 6,
    whole: 4,
    short: 2,
    stop: 3,
    two: 2,
    seeded: 3,
    schema: 2,
    leave_at_once: 3,
    leave_later: 3,
    stop_talking: 1,
    read_slowly: 2,
    read_nothing: 1,
    bad_body: 3,
    look: 1,
}
"""How often each happens, relative to the others."""


def drawn_kinds(count: int, seed: int) -> list[Kind]:
    """So many, in their shares, in random order."""
    in_all = sum(SHARES.values())
    made = [kind for kind, share in SHARES.items() for _ in range(1 + count * share // in_all)]
    random.Random(seed).shuffle(made)
    return made[:count]
