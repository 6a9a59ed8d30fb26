"""A limit on what a test may take, where the fault would be a hang."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """Fail a test that waits, or searches with a regular expression, far longer than anything
    should.
    """

    def late(*_: Any) -> None:
        raise AssertionError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
