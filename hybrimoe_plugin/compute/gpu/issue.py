"""Who gives transfers to the device: the caller at once, or a thread where bytes must be copied for
them first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

from hybrimoe_plugin.device.streams import Event
from hybrimoe_plugin.errors import BackendError

Events = tuple[Event, ...]

Job = Callable[[], Events]
"""Queues device work; gives the points that it is over at."""


class Arrival(Protocol):
    """What a job gives, perhaps later. A `Future` is one."""

    def done(self) -> bool:
        """Whether the job is over."""
        ...

    def result(self) -> Events:
        """The job's events; the host waits until the device has been given the work. Raises:
        BackendError.
        """
        ...


class Issuer(Protocol):
    """Runs jobs one at a time, in the order of `submit`."""

    def submit(self, job: Job) -> Arrival: ...

    def check(self) -> None:
        """Raises: BackendError: a job has failed."""
        ...

    def drain(self) -> None:
        """The host waits until every job is over."""
        ...

    def forget(self) -> None:
        """Take jobs again after one has failed; nothing may be running."""
        ...

    def close(self) -> None:
        """Drain, and take no more jobs."""
        ...


class Issued(NamedTuple):
    """A job that is over."""

    events: Events

    def done(self) -> bool:
        return True

    def result(self) -> Events:
        return self.events


class AtOnce:
    """Jobs run in `submit`: the plain twin, and all there is to do where the link reads stored
    bytes themselves.
    """

    def submit(self, job: Job) -> Arrival:
        return Issued(job())

    def check(self) -> None:
        """A job's error was the caller's."""

    def drain(self) -> None:
        """Nothing is left to do."""

    def forget(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""


class OnThread:
    """Jobs run on one thread, so that the caller need not wait while bytes are copied.

    After a job has failed, later ones are not begun until `forget`: slots would hold wrong bytes.
    Each of them, and `check`, raises what it failed with. At the interpreter's exit, jobs that were
    submitted are finished before CUDA is torn down: `concurrent.futures` sees to that.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "hybrimoe-staging")
        self._last: Future[Events] | None = None
        self._worker: int | None = None
        self._error: BaseException | None = None

    def submit(self, job: Job) -> Arrival:
        self._last = self._pool.submit(self._run, job)
        return self._last

    def check(self) -> None:
        if self._error is not None:
            raise BackendError(
                f"experts could not be sent to the accelerator: {self._error}"
            ) from self._error

    def drain(self) -> None:
        if self._last is not None and not self._on_worker():
            wait([self._last])

    def forget(self) -> None:
        self._error = None

    def close(self) -> None:
        self._pool.shutdown(wait=not self._on_worker())

    def _on_worker(self) -> bool:
        """A garbage collection may close a forgotten model on this very thread, which cannot wait
        for itself.
        """
        return self._worker == threading.get_ident()

    def _run(self, job: Job) -> Events:
        self._worker = threading.get_ident()
        self.check()
        try:
            return job()
        except BaseException as error:
            self._error = error
        self.check()
        raise AssertionError("check() raises where there is an error")
