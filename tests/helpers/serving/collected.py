"""A sink that keeps an answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hybrimoe_plugin.serve.requests import End, Token


class Collected:
    """Attributes:
    ids: the answer so far.
    cached: tokens of the prompt that were not computed.
    end_: how it ended.
    """

    def __init__(
        self, stop: Callable[[list[int]], bool] = lambda _: False, seconds: float = 60.0
    ) -> None:
        self.ids: list[int] = []
        self.cached: int | None = None
        self.end_: End | None = None
        self.times: list[float] = []
        self._stop = stop
        self._seconds = seconds
        self._done = threading.Event()

    def started(self, cached_tokens: int) -> None:
        self.cached = cached_tokens

    def put(self, token: Token) -> bool:
        assert self.end_ is None
        self.ids.append(token.id)
        self.times.append(time.monotonic())
        return not self._stop(self.ids)

    def end(self, end: End) -> None:
        assert self.end_ is None, "told twice"
        self.end_ = end
        self._done.set()

    def wait(self) -> End:
        assert self._done.wait(self._seconds), "no end came"
        assert self.end_ is not None
        return self.end_
