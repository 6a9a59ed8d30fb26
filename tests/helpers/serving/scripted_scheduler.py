"""A scheduler that answers every request with the same text, for tests of handlers."""

from __future__ import annotations

import threading
import time
from typing import Any

from hybrimoe_plugin.serve.requests import (
    ClosingError,
    End,
    Load,
    QueueFullError,
    Reason,
    Request,
    Sink,
    Token,
)


class ScriptedScheduler:
    """Implements `Scheduling` without a model: each request has a thread of its own.

    Attributes:
        requests: all that were submitted.
        full: whether the queue refuses.
        together, context, failed: as of a scheduler.
        tickets, threads: of the requests.
    """

    def __init__(self, tokenizer: Any, text: str, seconds_per_token: float = 0.0) -> None:
        self.requests: list[Request] = []
        self.full = False
        self.together = True
        self.context: int | None = 2048
        self.failed: BaseException | None = None
        self.cached_tokens = 0
        self.error: BaseException | None = None
        """What fails instead of the answer's end."""
        self._ids = tokenizer.encode(text, add_special_tokens=False)
        self._seconds = seconds_per_token
        self._closed = False
        self.tickets: list[ScriptedTicket] = []
        self.threads: list[threading.Thread] = []

    def submit(self, request: Request, sink: Sink) -> ScriptedTicket:
        if self._closed:
            raise ClosingError("the server is being shut down")
        if self.full:
            raise QueueFullError("the queue is full")
        self.requests.append(request)
        ticket = ScriptedTicket()
        thread = threading.Thread(target=self._answer, args=(request, sink, ticket), daemon=True)
        self.tickets.append(ticket)
        self.threads.append(thread)
        thread.start()
        return ticket

    def load(self) -> Load:
        return Load(0, 0, 0, 0, 0, 0)

    def close(self, seconds: float) -> None:
        self._closed = True
        until = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
        for ticket in self.tickets:
            ticket.cancel()
        for thread in self.threads:
            thread.join()

    def _answer(self, request: Request, sink: Sink, ticket: ScriptedTicket) -> None:
        sink.started(self.cached_tokens)
        most = len(self._ids) if request.max_tokens is None else request.max_tokens
        given = 0
        reason = Reason.LENGTH if most < len(self._ids) else Reason.STOP
        for token in self._ids[:most]:
            time.sleep(self._seconds)
            if ticket.cancelled.is_set():
                reason = Reason.CANCELLED
                break
            given += 1
            asked = request.sampling.logprobs
            top = tuple((token + at, -0.5 - at) for at in range(asked or 0))
            if not sink.put(Token(token, None if asked is None else -0.5, top)):
                reason = Reason.STOP
                break
        if self.error is not None:
            reason = Reason.FAILED
        sink.end(End(reason, given, self.error))


class ScriptedTicket:
    """Attributes:
    cancelled: set by `cancel`.
    """

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()
