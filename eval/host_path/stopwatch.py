"""Timing methods from outside, and what that costs."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter_ns
from typing import Any

Method = tuple[Any, str]
"""An object and the name of its method."""

CALIBRATION = 2000
"""Calls by which a watch's own time is measured."""


@contextmanager
def replaced(
    methods: Iterable[Method], make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """While entered, these methods of these objects are what `make` makes of them."""
    chosen = list(methods)
    for owner, method in chosen:
        setattr(owner, method, make(getattr(owner, method)))
    try:
        yield
    finally:
        for owner, method in chosen:
            delattr(owner, method)


class Stopwatch:
    """Watches methods, each under a name, and adds up their times between two `take`s.

    Attributes:
        own_us: what the watch itself adds to the time of one call. It is subtracted.
    """

    def __init__(self) -> None:
        self._spent_ns: dict[str, int] = {}
        self._calls: dict[str, int] = {}
        self.own_us = 0.0
        self.own_us = self._measure_own()

    def take(self) -> dict[str, float]:
        """Name -> time in us since the last `take`, calls of each other included."""
        found = {}
        for name, spent_ns in self._spent_ns.items():
            calls = self._calls[name]
            found[name] = max(0.0, spent_ns / 1e3 - calls * self.own_us) if calls else 0.0
            self._spent_ns[name] = self._calls[name] = 0
        return found

    @contextmanager
    def on(self, watched: dict[str, list[Method]]) -> Iterator[None]:
        """Watch methods under each name while entered."""
        with ExitStack() as stack:
            for name, methods in watched.items():
                watching = functools.partial(self._watching, name)
                stack.enter_context(replaced(methods, watching))
            yield

    def _watching(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        spent_ns, calls = self._spent_ns, self._calls
        spent_ns[name] = calls[name] = 0

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter_ns()
            result = call(*args, **kwargs)
            spent_ns[name] += perf_counter_ns() - started
            calls[name] += 1
            return result

        return watched

    def _measure_own(self) -> float:
        def nothing() -> None:
            pass

        watched = self._watching("own", nothing)
        found = []
        for _ in range(CALIBRATION):
            watched()
            found.append(self.take()["own"])
        del self._spent_ns["own"], self._calls["own"]
        return statistics.median(found)
