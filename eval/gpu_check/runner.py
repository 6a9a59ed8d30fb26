"""Runs a stage in a process of its own, which costs only itself if it hangs or dies."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from eval.gpu_check.plan import Stage

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
_TAIL_BYTES = 1 << 16
GRACE_S = 5.0
"""How long a killed process may take to go; one that is stuck in the driver is left behind."""


def _writable_caches(scratch: Path) -> dict[str, str]:
    """Environment variables that move caches to `scratch`, if the usual folder cannot be written.

    They hold profiles, tuned tiles and compiled kernels.
    """
    try:
        usual = Path.home() / ".cache"
        usual.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=usual):
            return {}
    except (OSError, RuntimeError):
        return {
            "HYBRIMOE_CACHE": str(scratch / "cache"),
            "TRITON_CACHE_DIR": str(scratch / "triton"),
        }


class End(NamedTuple):
    """How one stage's process ended."""

    stage: str
    run: str
    """What the lines of this process have in common; empty where none was started."""
    status: str
    """`ok`, `failed`, `died` (by a signal), `timeout`, or `skipped`."""
    seconds: float
    detail: str = ""
    """For all but `ok`: the last line of its log, or why it was skipped."""


class Running:
    """A stage's process.

    Args:
        flags: more arguments for `eval.gpu_check.child`.
    """

    def __init__(
        self, stage: Stage, limit_s: float, out: Path, scratch: Path, flags: Iterable[str]
    ) -> None:
        self.stage = stage
        self._limit_s = limit_s
        self._started = time.monotonic()
        self._log = out / f"{stage.name}.log"
        self.run = uuid.uuid4().hex[:12]
        self._logged = self._log.stat().st_size if self._log.exists() else 0
        command = [
            sys.executable,
            "-m",
            "eval.gpu_check.child",
            stage.name,
            "--module",
            stage.path,
        ]
        command += ["--out", str(out), "--scratch", str(scratch), "--limit", f"{limit_s:g}"]
        command += ["--run", self.run, *flags]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **_writable_caches(scratch),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        environment["PYTHONUNBUFFERED"] = "1"
        with self._log.open("ab") as file:
            # A session of its own, so that what the stage started is killed with it.
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def wait(self) -> End:
        """Wait until the stage ends or its time is over."""
        left = self._limit_s - (time.monotonic() - self._started)
        try:
            code = self._process.wait(max(0.0, left))
        except subprocess.TimeoutExpired:
            self.kill()
            return self._end(
                "timeout", f"killed after {self._limit_s:.0f} s; {self._log.name} says where it was"
            )
        self._kill_group()  # whatever the stage left running
        if code == 0:
            return self._end("ok")
        if code < 0:
            return self._end("died", f"{_signal_name(-code)}; {self._last_line()}")
        return self._end("failed", self._last_line())

    def kill(self) -> None:
        """End the process and all that it started."""
        self._kill_group()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            log.warning(
                "%s: process %d does not end, and is left behind",
                self.stage.name,
                self._process.pid,
            )

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone already
            os.killpg(self._process.pid, signal.SIGKILL)

    def _end(self, status: str, detail: str = "") -> End:
        return End(
            self.stage.name, self.run, status, round(time.monotonic() - self._started, 2), detail
        )

    def _last_line(self) -> str:
        with self._log.open("rb") as file:
            file.seek(
                max(self._logged, self._log.stat().st_size - _TAIL_BYTES)
            )  # of this run, not of an earlier one
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        return said[-1][:200] if said else "its log is empty"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
