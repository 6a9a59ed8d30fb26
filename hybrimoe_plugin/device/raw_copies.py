"""Asynchronous copies by address: the CUDA runtime's own call, in the library that torch loaded.

torch's `copy_` needs a tensor on each side and enters a stream around it, which costs the host
several times what the runtime's call does.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

HOST_TO_DEVICE = 1
"""cudaMemcpyHostToDevice"""

RawCopy = Callable[[int, int, int, int, int], int]
"""cudaMemcpyAsync(target, source, bytes, kind, stream): 0, or the number of an error."""

_MAPS = Path("/proc/self/maps")


def loaded_copy(maps: Path = _MAPS) -> RawCopy | None:
    """The call; None where the process has no CUDA runtime of its own, or several.

    Args:
        maps: lists what is mapped into this process, as Linux does.
    """
    found = _loaded_runtimes(maps)
    if len(found) != 1:
        log.debug("%d CUDA runtimes are loaded: copies go through torch", len(found))
        return None
    try:
        # Keeps the interpreter's lock, unlike CDLL: to get it back from another thread can take
        # longer than the copy, and the call only queues. It loads nothing that is not there.
        library = ctypes.PyDLL(found.pop(), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        call = library.cudaMemcpyAsync
    except (OSError, AttributeError) as error:
        log.debug("copies go through torch: %s", error)
        return None
    call.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
        *(ctypes.c_int, ctypes.c_void_p),
    )
    call.restype = ctypes.c_int
    return call


def _loaded_runtimes(maps: Path) -> set[str]:
    """Paths of the CUDA runtimes that are mapped into this process."""
    try:
        lines = maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    # address permissions offset device inode path
    paths = [line.split(maxsplit=5)[5] for line in lines if "/libcudart" in line]
    return {path for path in paths if ".so" in Path(path).name}
