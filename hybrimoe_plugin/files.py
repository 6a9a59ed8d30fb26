"""Files from outside, which may be pipes, devices or unexpectedly large, and how to show them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import BinaryIO

from hybrimoe_plugin.errors import ConfigError

_HEAD_BYTES = 128
"""Enough to tell the kind of a file."""


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


def check_replaceable(path: str, flag: str, kind: str, is_own: Callable[[bytes], bool]) -> None:
    """Refuse to replace a file of another kind than the one that is to be written.

    Pipes and devices are written to, not replaced: they may be anything.

    Args:
        flag: that names the file.
        is_own: whether a file that begins with these bytes is of the kind.

    Raises:
        ConfigError: the name is empty, or such a file is there.
        OSError: the file that is there cannot be read.
    """
    if not path:
        raise ConfigError(f"{flag} is empty: give the name of a file")
    if not os.path.isfile(path):
        return
    with open_regular(path) as file:
        head = file.read(_HEAD_BYTES)
    if head and not is_own(head):
        raise ConfigError(
            f"{flag} {path} exists and is not replaced, as it is no {kind}: choose another name"
        )


def printable(text: str) -> str:
    """The text with escapes such as \\x1b for what a terminal would obey, or cannot show."""
    shown = (
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return "".join(shown)


def one_line(text: str) -> str:
    """The text as one line that a terminal only shows, and obeys in nothing."""
    return printable(" ".join(text.split()))


def human(size: float) -> str:
    """`1.5 GiB` for 1610612736."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
