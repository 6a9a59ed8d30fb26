"""Who queues transfers on the device: the caller, or a thread where bytes must be copied first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

from hybrimoe_plugin.device.streams import Event
from hybrimoe_plugin.errors import BackendError

Events = tuple[Event, ...]

Job = Callable[[], Events]
"""Queues device work; returns the events that mark its end."""


class QueuedWork(Protocol):
    """A submitted job and, once it has run, its events. A `Future` is one."""

    def done(self) -> bool:
        """Whether the job has run."""
        ...

    def result(self) -> Events:
        """The job's events; the host waits until the job has run.

        Raises:
            BackendError: the job failed.
        """
        ...


class TransferExecutor(Protocol):
    """Runs jobs one at a time, in the order of `submit`."""

    def submit(self, job: Job) -> QueuedWork:
        """Run a job now or later."""
        ...

    def check(self) -> None:
        """Raises: BackendError: a job has failed."""
        ...

    def drain(self) -> None:
        """Make the host wait until every job has run."""
        ...

    def forget_failure(self) -> None:
        """Take jobs again after one has failed; nothing may be running."""
        ...

    def close(self) -> None:
        """Drain, and take no more jobs."""
        ...


class DoneWork(tuple[Event, ...]):
    """A job that has run: its events."""

    __slots__ = ()

    def done(self) -> bool:
        return True

    def result(self) -> Events:
        return self


class InlineExecutor:
    """Runs jobs in `submit`.

    The reference, and all that is needed where the link reads stored bytes themselves.
    """

    def submit(self, job: Job) -> QueuedWork:
        return DoneWork(job())

    def check(self) -> None:
        """Nothing to do: a job's error was raised in `submit`."""

    def drain(self) -> None:
        """Nothing to do: every job has run."""

    def forget_failure(self) -> None:
        """Nothing to do: no failure is kept."""

    def close(self) -> None:
        """Nothing to do: nothing is held."""


class ThreadExecutor:
    """Runs jobs on one thread, so that the caller need not wait while bytes are copied.

    After a job has failed, later ones are not begun until `forget_failure`: slots would hold wrong
    bytes. Each of them, and `check`, raises what it failed with. At the interpreter's exit, jobs
    that were submitted are finished before CUDA is torn down: `concurrent.futures` sees to that.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "hybrimoe-staging")
        self._last: Future[Events] | None = None
        self._worker: int | None = None
        self._error: BaseException | None = None

    def submit(self, job: Job) -> QueuedWork:
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

    def forget_failure(self) -> None:
        self._error = None

    def close(self) -> None:
        self._pool.shutdown(wait=not self._on_worker())

    def _on_worker(self) -> bool:
        """Whether the caller is the executor's own thread, which cannot wait for itself.

        A garbage collection on that thread may close a model that is no longer used.
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
