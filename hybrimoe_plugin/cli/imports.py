"""Large libraries are imported under a Ctrl-C of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from hybrimoe_plugin.cli.main import INTERRUPTED


def import_libraries() -> None:
    """Import what every command that opens a model needs; some seconds on a cold disk."""
    with _ending_at_once():
        import hybrimoe_plugin.hosts.transformers.load  # noqa: F401 (and with it torch and transformers)
        from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel
        from hybrimoe_plugin.errors import BackendError

        with contextlib.suppress(BackendError):  # who needs it will say so
            import_kernel()


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """Ctrl-C ends the process.

    Nothing is lost yet; and libraries in C++ that run Python while they are set up cannot hand an
    exception on: with a KeyboardInterrupt they abort.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(*_args: object) -> None:
    os.write(2, b"\nhybrimoe: interrupted\n")
    os._exit(INTERRUPTED)
