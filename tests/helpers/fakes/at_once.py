"""Calls on several threads at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

LONG_S = 600
"""No thread waits so long, unless it waits for ever."""


def in_threads(calls: Sequence[Callable[[], Any]], limit_s: float = LONG_S) -> list[Any]:
    """What calls give that are made at the same time, each on a thread of its own; raises what one
    raised.
    """
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def run(place: int) -> None:
        try:
            start.wait()
            results[place] = calls[place]()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(calls))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit_s)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    if errors:
        raise errors[0]
    return results
