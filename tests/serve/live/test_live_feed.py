"""The feed: who gets what, and that it costs nothing while nobody watches."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hybrimoe_plugin.serve.live import feed as feed_module
from hybrimoe_plugin.serve.live.events import sample_event
from hybrimoe_plugin.serve.live.feed import Feed
from hybrimoe_plugin.serve.live.rates import Rates
from hybrimoe_plugin.serve.live.routes import WatcherResponse
from hybrimoe_plugin.serve.live.sources import Sample
from hybrimoe_plugin.serve.requests import Load

IDLE = Load(0, 0, 0, 0, 0, 0)


class Numbered:
    """A source whose samples have numbers as rates."""

    layers = (0, 1)
    experts = 3
    accelerator = "none"
    flash = False
    window_us = 1e6

    def __init__(self) -> None:
        self.begun = self.ended = self.taken = 0
        self.error: Exception | None = None

    def begin(self) -> None:
        self.begun += 1

    def end(self) -> None:
        self.ended += 1

    def sample(self) -> Sample:
        if self.error is not None:
            raise self.error
        self.taken += 1
        nothing = np.zeros((2, 3), np.uint8)
        return Sample(nothing, nothing.astype(bool), None, Rates(float(self.taken), 0.0, None))


def service(**more: Any) -> Any:
    return SimpleNamespace(
        name="tiny", closing=False, scheduler=SimpleNamespace(load=lambda: IDLE), **more
    )


def made(source: Any, interval_s: float = 0.001) -> Feed:
    return Feed(service(), source, interval_s)


def body(event: bytes) -> Any:
    return json.loads(event.decode().partition("data: ")[2])


def test_the_first_event_says_what_is_watched() -> None:
    async def run() -> None:
        events = made(Numbered()).events()
        assert body(await anext(events))["layers"] == [0, 1]
        assert body(await anext(events))["tokens_s"] == 1.0
        await events.aclose()

    asyncio.run(run())


def test_a_model_without_experts_has_a_feed_that_ends() -> None:
    async def run() -> None:
        found = [event async for event in made(None).events()]
        assert [body(event) for event in found] == [{"model": "tiny", "layers": []}]

    asyncio.run(run())


def test_samples_are_taken_once_for_all_and_stop_with_the_last_watcher() -> None:
    async def run() -> None:
        source = Numbered()
        feed = made(source)
        watchers = [feed.events() for _ in range(3)]
        assert source.begun == 0
        for events in watchers:
            await anext(events)
        found = await asyncio.gather(*(anext(events) for events in watchers))
        assert len(set(found)) == 1
        for events in watchers:
            assert source.ended == 0
            await events.aclose()
        assert not feed.sampling
        await asyncio.sleep(0.02)
        assert (source.begun, source.ended) == (1, 1)
        taken = source.taken
        await asyncio.sleep(0.02)
        assert source.taken == taken

    asyncio.run(run())


def test_a_slow_watcher_gets_the_newest_sample() -> None:
    async def run() -> None:
        source = Numbered()
        events = made(source).events()
        await anext(events)
        await anext(events)
        while source.taken < 5:
            await asyncio.sleep(0.001)
        taken = source.taken
        assert body(await anext(events))["tokens_s"] >= taken
        await events.aclose()

    asyncio.run(run())


def test_only_so_many_may_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MOST_WATCHERS", 1)

    async def run() -> None:
        feed = made(Numbered())
        first = feed.events()
        await anext(first)
        assert not feed.full
        await anext(first)
        assert feed.full
        await first.aclose()
        assert not feed.full

    asyncio.run(run())


def test_a_source_that_fails_ends_the_feed_and_may_be_watched_again() -> None:
    async def run() -> None:
        source = Numbered()
        source.error = RuntimeError("dictionary changed size during iteration")
        feed = made(source)
        assert len([event async for event in feed.events()]) == 1
        assert (feed.sampling, source.ended) == (False, 1)
        source.error = None
        events = feed.events()
        await anext(events)
        await anext(events)
        await events.aclose()

    asyncio.run(run())


def test_the_feed_ends_when_the_server_closes() -> None:
    async def run() -> None:
        owner = service()
        events = Feed(owner, Numbered(), 0.001).events()
        await anext(events)
        await anext(events)
        owner.closing = True
        async for _ in events:
            pass

    asyncio.run(run())


def test_a_watcher_that_takes_nothing_is_dropped() -> None:
    async def run() -> None:
        feed = made(Numbered())
        response = WatcherResponse(feed.events(), slowest_s=0.02)
        sent = []

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) > 3:
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        await response({"type": "http"}, receive, send)
        assert len(sent) == 4
        assert not feed.sampling

    asyncio.run(run())


def test_a_sample_is_small_and_can_be_read_back() -> None:
    generator = np.random.default_rng(0)
    places = generator.integers(0, 4, (61, 255), np.uint8)
    used = generator.random(places.shape) < 0.1
    lanes = generator.random((3, 100))
    event = sample_event(Sample(places, used, lanes, Rates(1.0, 0.0, None)), IDLE)
    assert len(event) < 10_000
    found = body(event)
    raw = np.frombuffer(b64decode(found["places"]), np.uint8)
    bits = np.unpackbits(raw, bitorder="little")[: 2 * places.size].reshape(-1, 2)
    assert np.array_equal(bits @ [1, 2], places.ravel())
    raw = np.frombuffer(b64decode(found["used"]), np.uint8)
    assert np.array_equal(np.unpackbits(raw, bitorder="little")[: used.size], used.ravel())
    assert sum(found["counts"].values()) == places.size
