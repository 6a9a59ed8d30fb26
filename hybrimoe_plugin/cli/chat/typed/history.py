"""What was typed in former conversations, in a file that only its owner reads."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from hybrimoe_plugin.cache_folder import unusable
from hybrimoe_plugin.files import open_regular

HISTORY = "chat_history"
MAX_BYTES = 2**20
"""Of the file's end: what is read of a long history."""
_ENTRY = re.compile(rb"^# .*\n((?:\+.*\n)+)", re.MULTILINE)


def history(folder: Path) -> History:
    """What was typed before; in memory where it cannot be kept in the folder."""
    path = folder / HISTORY
    if unusable(folder) is not None or not _is_private(path):
        return InMemoryHistory()
    return _FileHistory(path)


class _FileHistory(FileHistory):
    """A history that costs no message: what cannot be read or written is left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(path)

    def load_history_strings(self) -> Iterable[str]:
        """The messages, the last one first."""
        with contextlib.suppress(OSError), open_regular(self._path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_BYTES))
            entries = _ENTRY.findall(file.read(MAX_BYTES))
            for entry in reversed(entries):
                text = entry.decode("utf-8", errors="replace")
                yield "\n".join(line[1:] for line in text.split("\n")[:-1])

    def store_string(self, string: str) -> None:
        # Asked each time: the file may have been removed, and a new one is for everybody to read.
        if _is_private(self._path):
            with contextlib.suppress(OSError, UnicodeError):
                super().store_string(string)


def _is_private(path: Path) -> bool:
    """Make a file its owner's alone, where there is none also the file; False where that fails."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError:
        return False
    try:
        is_file = stat.S_ISREG(os.fstat(handle).st_mode)
        if is_file:
            os.fchmod(handle, 0o600)
    except OSError:
        return False
    finally:
        os.close(handle)
    return is_file
