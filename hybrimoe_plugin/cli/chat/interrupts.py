"""What Ctrl-C does in a conversation, wherever it comes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupts:
    """Handles Ctrl-C as long as a conversation lasts.

        reading from a pipe, prompt's pass    raises KeyboardInterrupt at once
        answer                                ends it between two tokens; the second one raises
        anywhere else                         nothing: it is short, and must not be torn

    A prompt's pass has no token to wait for, and may take minutes. An editor at a terminal has a
    handler of its own while it reads.

    Attributes:
        requested: whether the answer is to end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._raises = False
        self._has_begun: Callable[[], bool] = lambda: False
        self._installed = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Take over Ctrl-C while the block runs; then restore the previous handler."""
        if self._installed or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_interrupt)
        self._installed = True
        try:
            yield
        finally:
            self._installed = False
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let Ctrl-C raise KeyboardInterrupt while the block runs."""
        with self.answering(lambda: False):
            yield

    @contextmanager
    def answering(self, has_begun: Callable[[], bool]) -> Iterator[None]:
        """Let Ctrl-C end the answer that the block makes.

        Args:
            has_begun: whether there is a first token, so that the next one can be waited for.
        """
        self.requested = False
        self._has_begun = has_begun
        try:
            self._raises = True
            yield
        finally:
            self._raises = False

    def _on_interrupt(self, _number: int, _frame: object) -> None:
        if not self._raises:
            return
        if self.requested or not self._has_begun():
            self._raises = False  # what handles the exception must not be interrupted again
            raise KeyboardInterrupt
        self.requested = True
