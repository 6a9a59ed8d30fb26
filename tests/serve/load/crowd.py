"""Many clients at once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import httpx2
import psutil

from tests.serve.load import kinds
from tests.serve.load.kinds import Client, Kind
from tests.serve.load.world import CHAT, LENGTH, Question, World

LOST_S = 240.0
"""A request without an answer after so long is lost."""
SEEDS = range(2)


@dataclass
class Report:
    """What became of the requests.

    Attributes:
        done: right answers by kind.
        wrong: what the others got.
        rss: bytes of this process, clients and server, at the beginning and at each quarter.
    """

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)


def run(world: World, clients: int, requests: int, seed: int = 0) -> Report:
    """Let clients do so many things, each one after another."""
    return asyncio.run(_run(world, clients, requests, seed))


async def _run(world: World, clients: int, requests: int, seed: int) -> Report:
    report = Report()
    todo = iter(enumerate(kinds.drawn_kinds(requests, seed)))
    every = max(1, requests // 4)
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(
        base_url=world.url, timeout=LOST_S, limits=limits, trust_env=False
    ) as http:
        alone = await _alone(http, world)

        async def one(number: int) -> None:
            client = Client(http, world.port, random.Random(f"{seed} {number}"), alone)
            for at, kind in todo:  # all clients take from the same ones
                if at % every == 0:
                    report.rss.append(psutil.Process().memory_info().rss)
                await _try(client, kind, client.drawn.choice(world.questions), report)

        await asyncio.gather(*map(one, range(clients)))
    report.rss.append(psutil.Process().memory_info().rss)
    return report


async def _alone(http: httpx2.AsyncClient, world: World) -> dict[tuple[str, int], str]:
    """(greedy text, seed) -> what is drawn by the seed while nobody else asks."""
    client = Client(http, world.port, random.Random(0), {})
    return {
        (question.text, seed): kinds.texts(
            await client.post(question, temperature=0.8, max_tokens=LENGTH, seed=seed)
        )[0]
        for question in world.questions
        for seed in SEEDS
    }


async def _try(client: Client, kind: Kind, question: Question, report: Report) -> None:
    try:
        await asyncio.wait_for(kind(client, question), LOST_S)
    except Exception as error:
        where = "chat" if question.path == CHAT else "completions"
        report.wrong.append(f"{kind.__name__} ({where}): {type(error).__name__}: {error}")
    else:
        report.done[kind.__name__] += 1
