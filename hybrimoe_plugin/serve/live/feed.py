"""Takes samples while somebody watches, and hands the newest to everybody who does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from hybrimoe_plugin.serve.live.events import model_event, sample_event
from hybrimoe_plugin.serve.live.sources import Source
from hybrimoe_plugin.serve.service import Service

log = logging.getLogger(__name__)

INTERVAL_S = 0.2
MOST_WATCHERS = 16


class Feed:
    """One sampler for all watchers, on the event loop. It stops with the last of them.

    A watcher that is slow gets the newest sample when it comes back for more.

    Args:
        source: None for a model without experts to show.
    """

    def __init__(
        self, service: Service, source: Source | None, interval_s: float = INTERVAL_S
    ) -> None:
        self._service = service
        self._source = source
        self._interval_s = interval_s
        self._watchers = 0
        self._task: asyncio.Task[None] | None = None
        self._newest: bytes = b""
        self._news = asyncio.Event()
        """Set with each sample, and replaced by another one."""

    @property
    def full(self) -> bool:
        """Whether as many watch as may."""
        return self._watchers >= MOST_WATCHERS

    @property
    def sampling(self) -> bool:
        """Whether samples are being taken."""
        return self._task is not None

    async def events(self) -> AsyncGenerator[bytes, None]:
        """What one watcher is sent, until the server closes or the engine cannot be sampled."""
        yield model_event(self._service.name, self._source)
        if self._source is None:
            return
        self._watchers += 1
        try:
            if self._task is None:
                self._task = asyncio.create_task(self._sample(self._source))
            while True:
                await self._news.wait()
                if self._task is None:
                    return
                yield self._newest
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._stop()

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _sample(self, source: Source) -> None:
        source.begin()
        try:
            while not self._service.closing:
                await asyncio.sleep(self._interval_s)
                self._newest = sample_event(source.sample(), self._service.scheduler.load())
                self._tell()
        except Exception:
            log.exception("the engine cannot be watched")
        finally:
            source.end()
        self._task = None
        self._tell()
