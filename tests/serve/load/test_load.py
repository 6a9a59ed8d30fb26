"""64 clients at once: no answer is lost or another's, and nothing stays behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx2
import pytest
from serving import wait_until

from tests.serve.load import crowd, kinds
from tests.serve.load.kinds import GREEDY, SHARES
from tests.serve.load.world import EMULATED, Prepared, World, prepare, world

CLIENTS, REQUESTS = 64, 500
GROWTH = 96 << 20
"""Bytes that the process may grow by after its first quarter: allocators keep what they had.

All answers' KV caches and texts together are more.
"""

Loaded = tuple[World, crowd.Report]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("load"))


@pytest.fixture(scope="module")
def loaded(prepared: Prepared) -> Iterator[Loaded]:
    with world(prepared) as made:
        yield made, crowd.run(made, CLIENTS, REQUESTS)


def test_none_is_lost_and_none_is_mixed_up(loaded: Loaded) -> None:
    _, report = loaded
    assert report.wrong == []
    assert report.done.total() == REQUESTS
    assert set(report.done) == {kind.__name__ for kind in SHARES}


def test_nothing_runs_or_waits_afterwards(loaded: Loaded) -> None:
    scheduler = loaded[0].service.scheduler
    wait_until(lambda: scheduler.load().running + scheduler.load().waiting == 0)
    load = scheduler.load()
    assert load.kv_bytes == 0
    assert 0 < load.prefix_bytes <= load.prefix_limit
    assert scheduler.failed is None


def test_memory_is_bounded(loaded: Loaded) -> None:
    first, *_, last = loaded[1].rss[1:]
    assert last - first < GROWTH


def test_the_server_is_well_afterwards(loaded: Loaded) -> None:
    made, _ = loaded
    with httpx2.Client(base_url=made.url, trust_env=False, timeout=60) as client:
        assert client.get("/health").status_code == 200
        for question in made.questions[:6]:
            answer = client.post(question.path, json={**question.body, **GREEDY})
            assert kinds.texts(answer.json()) == [question.text]


def test_experts_on_an_accelerator(prepared: Prepared) -> None:
    with world(prepared, **EMULATED) as made:
        report = crowd.run(made, CLIENTS, REQUESTS // 4, seed=1)
    assert report.wrong == []


def test_a_full_queue_refuses_and_answers_the_others(prepared: Prepared) -> None:
    with world(prepared, batch=2, queue=4) as made:
        found = asyncio.run(_ask_all(made, 40))
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 4
    assert all(right for _, right in found)


async def _ask_all(made: World, count: int) -> list[tuple[int, bool]]:
    """(status, whether the answer is right or says why not) of requests at once."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(
        base_url=made.url, timeout=120, limits=limits, trust_env=False
    ) as http:

        async def one(number: int) -> tuple[int, bool]:
            question = made.questions[number % len(made.questions)]
            answer = await http.post(question.path, json={**question.body, **GREEDY})
            if answer.status_code != 200:
                return answer.status_code, "waiting" in answer.json()["error"]["message"]
            return 200, kinds.texts(answer.json()) == [question.text]

        return await asyncio.gather(*map(one, range(count)))
