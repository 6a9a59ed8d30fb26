"""Import large libraries, during which Ctrl-C ends the process."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator

from hybrimoe_plugin.cli.main import INTERRUPTED


def import_libraries() -> None:
    """Import what every command that opens a model needs: seconds, on a cold disk."""
    with _ending_at_once(), _no_collections():
        import transformers.modeling_layers  # noqa: F401 (what the code of every model imports)

        import hybrimoe_plugin.hosts.transformers.load  # noqa: F401 (and with it torch)
        from hybrimoe_plugin.compute.cpu.kt_kernel import import_kernel
        from hybrimoe_plugin.errors import BackendError

        with contextlib.suppress(BackendError):  # reported where the kernel is needed
            import_kernel()


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Collect no garbage meanwhile, nor look through what is there by then ever again.

    Imports make a million objects that stay until the end. Looking through them time and again is
    a sixth of the time that imports take (docs/LOG.md).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """End the process on Ctrl-C.

    C++ libraries that run Python while they initialise cannot pass on an exception: they abort on
    a KeyboardInterrupt. Ending at once loses nothing, as no work has begun.
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
