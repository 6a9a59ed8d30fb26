"""One answer in the making."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from hybrimoe_plugin.serve.requests import Request, Sink


class Sequence:
    """A request with its tokens, its KV cache and whoever waits for the answer.

        ids        | prompt ............ | answer so far |
        computed   |<- entries in the cache -->|
                                               |<------->|  pending

    Args:
        sampler: draws this answer's tokens.
        wake: tells the scheduler's thread that something has changed.

    Attributes:
        ids: prompt and answer so far.
        cache: transformers' KV cache of this sequence alone; None while it waits.
        computed: how many of `ids` have entries in the cache.
        given: tokens that the sink has taken.
        owner: a small number that no other running sequence has.
        failures: passes of this sequence that failed.
        served: number of the last piece of a prompt that was computed for it.
        queued_at, last_at: when it came, and when its last token did; seconds, monotonic.
        is_cancelled: whether nobody wants the answer any more.
    """

    def __init__(
        self, request: Request, sink: Sink, sampler: Any, wake: Callable[[], object]
    ) -> None:
        self.request = request
        self.sink = sink
        self.sampler = sampler
        self.ids = list(request.prompt)
        self.cache: Any = None
        self.computed = 0
        self.given = 0
        self.owner = 0
        self.failures = 0
        self.served = 0
        self.was_started = False
        self.queued_at = self.last_at = time.monotonic()
        self._cancelled = threading.Event()
        self._wake = wake

    @property
    def pending(self) -> int:
        """Tokens without an entry; the pass over the last of them gives the next token."""
        return len(self.ids) - self.computed

    def next_ids(self, count: int) -> list[int]:
        """The first of the pending tokens."""
        return self.ids[self.computed : self.computed + count]

    @property
    def is_decoding(self) -> bool:
        """Whether its next pass is one token behind others."""
        return self.pending == 1 and self.computed > 0

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """As `Ticket.cancel`."""
        self._cancelled.set()
        self._wake()

    def forget_cache(self) -> None:
        """Compute everything again, in another pass."""
        self.cache = None
        self.computed = 0
