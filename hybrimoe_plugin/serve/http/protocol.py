"""HTTP/1.1 by uvicorn and h11, with more care for clients that are slow, or leave early."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 20.0
"""In which a request's headers must have arrived, from their first byte or the connection on."""
MOST_AHEAD = 64 << 10
"""Bytes that a client may send behind a request that is being answered."""


class ImpatientProtocol(H11Protocol):
    """Closes connections that send no request, or a part of its headers only.

    uvicorn stops reading where more comes behind a request that it answers, and would not notice
    then that the client leaves. Here it reads on, within a limit.
    """

    seconds = SECONDS
    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= MOST_AHEAD:
            self.flow.resume_reading()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Let the clock run while headers are due, however slowly they drip in."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._limit is None:
            self._limit = self.loop.call_later(self.seconds, self.transport.close)

    def _stop_watching(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
