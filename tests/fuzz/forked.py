"""Run a call in a forked process with limits, and say how it ended. The parent must have no other
threads at work.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from hybrimoe_plugin.errors import HybriMoEError

ADDRESS_SPACE = 20 << 30
"""Bytes; far above what is allowed to be used, so that an overrun is measured rather than a
MemoryError.
"""
UNEXPECTED = "hybrimoe: error: unexpected "
"""How the command line reports an exception that nobody foresaw."""


class Outcome(NamedTuple):
    """How a call ended: `done`, `refused`, or one of the faults `signal`, `hang`, `traceback`,
    `memory`.
    """

    kind: str
    detail: str
    seconds: float
    """Processor time."""
    nbytes: int
    """Memory at its peak beyond what a call takes that does nothing."""

    @property
    def bad(self) -> bool:
        return self.kind not in ("done", "refused")


class Limits:
    """Runs calls under limits.

    Args:
        seconds: of processor time; a longer run is a hang. On a busy machine the clock says
            nothing.
        waiting: seconds by the clock; a call that waits for something longer than this is a hang
            too.
        nbytes: more memory than this is a fault.
    """

    def __init__(self, seconds: int, waiting: float, nbytes: int) -> None:
        self._seconds, self._waiting, self._most = seconds, waiting, nbytes
        self._idle = 0
        self._idle = self.run(lambda: None).nbytes

    def run(self, call: Callable[[], int | None]) -> Outcome:
        """Run a call in a child; its result, if it has one, is an exit code of the command line."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as report:
            child = os.fork()
            if child == 0:
                _child(call, self._seconds, output.fileno(), report.fileno())
            status, usage, late = _wait(child, time.monotonic() + self._waiting)
            output.seek(0)
            report.seek(0)
            text, told = output.read().decode("utf-8", "replace"), report.read()
        nbytes = (usage.ru_maxrss << 10) - self._idle
        kind, detail = _judge(status, late, told, text)
        if kind in ("done", "refused") and self._idle and nbytes > self._most:
            kind, detail = "memory", f"{nbytes >> 20} MiB; {detail}"
        return Outcome(kind, detail, usage.ru_utime + usage.ru_stime, nbytes)


def _child(call: Callable[[], int | None], seconds: int, output: int, report: int) -> None:
    """Never returns."""
    try:
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        try:
            code = call()
            told = ["refused" if code else "done", ""]
        except HybriMoEError as error:
            told = ["refused", f"{type(error).__name__}: {error}"]
        except BaseException:
            told = ["traceback", traceback.format_exc(limit=-4)]
        os.write(report, json.dumps(told).encode())
    finally:
        os._exit(0)


def _wait(child: int, until: float) -> tuple[int, resource.struct_rusage, bool]:
    """(wait status, usage, whether it had to be killed)."""
    late = False
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage, late
        if time.monotonic() > until and not late:
            late = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _judge(status: int, late: bool, told: bytes, text: str) -> tuple[str, str]:
    last = text.strip().splitlines()[-1] if text.strip() else ""
    if late:
        return "hang", last
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return "hang", f"out of processor time; {last}"
    if os.WIFSIGNALED(status):
        return "signal", f"{signal.Signals(os.WTERMSIG(status)).name}: {last}"
    if not told:
        return "signal", f"ended without a word: {last}"
    kind, detail = json.loads(told)
    if UNEXPECTED in text:
        return "traceback", last
    return kind, detail or last
