"""Open and read files from outside, which may be pipes, devices or unexpectedly large."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for unbuffered reading; never blocks, as opening a pipe would.

    Raises:
        OSError: it cannot be opened, or is a directory, a pipe, a socket or a device.
    """
    # NONBLOCK makes opening a pipe return at once; it changes nothing for regular files.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except ValueError as error:  # a zero byte in the name
        raise OSError(errno.EINVAL, str(error), path) from None
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "a pipe, socket or device, not a regular file", path)
        return os.fdopen(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """The whole of a regular file of at most `most` bytes.

    Raises:
        OSError: as `open_regular`, the file is larger, or it cannot be read.
    """
    parts: list[bytes] = []
    left = most + 1
    with open_regular(path) as file:
        # The file's size is not asked for: files in /proc state none.
        while left:
            part = file.read(left)
            if not part:
                break
            parts.append(part)
            left -= len(part)
    if not left:
        limit = _human_limit(most)
        raise OSError(errno.EFBIG, f"larger than the {limit} that such a file may have", path)
    return b"".join(parts)


def _human_limit(nbytes: int) -> str:
    if nbytes >= 1 << 20:
        return f"{nbytes >> 20} MiB"
    return f"{nbytes >> 10} KiB"


def human(size: float) -> str:
    """`1.5 GiB` for 1610612736."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
