"""A function in a process of its own, at a real pseudo-terminal that a test types into."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import termios
import time
import traceback
from collections.abc import Callable

CTRL_C, CTRL_D, ENTER, ALT_ENTER, UP = "\x03", "\x04", "\r", "\x1b\r", "\x1b[A"
PATIENCE_S = 30.0
"""On a busy machine; a test that fails waits so long, and no other."""


class Terminal:
    """Runs a function in a forked process, whose terminal this is.

    Args:
        run: returns the exit code.
    """

    def __init__(self, run: Callable[[], int]) -> None:
        self._seen = ""
        self._pid, self._handle = pty.fork()
        if self._pid == 0:
            _child(run)
        termios.tcsetwinsize(self._handle, (24, 80))

    def type(self, text: str) -> None:
        os.write(self._handle, text.encode())

    def expect(self, text: str) -> str:
        """Wait until the text is on the screen; gives all that came before it since last time."""
        end = time.monotonic() + PATIENCE_S
        while text not in self._seen:
            assert time.monotonic() < end, f"{text!r} did not come: {self._seen!r}"
            assert self._read(), f"{text!r} did not come before the end: {self._seen!r}"
        before, _, self._seen = self._seen.partition(text)
        return before

    def end(self) -> tuple[int, str]:
        """(exit code, negative for a signal; the rest of the screen) once the process has ended."""
        while self._read():
            pass
        _, status = os.waitpid(self._pid, 0)
        os.close(self._handle)
        self._handle = -1
        return os.waitstatus_to_exitcode(status), self._seen

    def close(self) -> None:
        """End the process of a test that failed."""
        if self._handle >= 0:
            os.kill(self._pid, signal.SIGKILL)
            self.end()

    def _read(self) -> bool:
        """Read what there is; False at the end."""
        ready, _, _ = select.select([self._handle], [], [], PATIENCE_S)
        if not ready:
            return False
        try:
            found = os.read(self._handle, 65536)
        except OSError:  # how Linux reports that the other side is closed
            return False
        self._seen += found.decode(errors="replace")
        return bool(found)


def _child(run: Callable[[], int]) -> None:
    """Never returns: what pytest has put around the function is left alone."""
    code = 70
    try:
        # pytest has replaced these.
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode, buffering=1, closefd=False)
            for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
