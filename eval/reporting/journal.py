"""A file of finished rows, one JSON object a line, that survives being killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of rows. Several processes may append to the same one.

    Args:
        path: the file. It and its folder are made at the first `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; it is on the disk when this returns.

        The row is one `write` on a file opened with O_APPEND, so rows of several processes do not
        mix. If the last line is torn, because its writer was killed or the disk was full, the row
        begins on a line of its own.

        Raises:
            OSError: the file cannot be written, or only a part of the row fitted.
            TypeError: a value has no form in JSON.
        """
        line = json.dumps(dict(row)).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if _is_torn(handle):
                line = b"\n" + line
            written = os.write(handle, line)
            if written < len(line):
                raise OSError(
                    f"{self.path}: only {written} of {len(line)} bytes of a row were written"
                )
            os.fsync(handle)
        finally:
            os.close(handle)

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows, in the order in which they were written; torn lines are left out.

        Returns:
            An empty list where there is no file.
        """
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        found = (_object(line) for line in lines)
        return [row for row in found if row is not None]

    def clear(self) -> None:
        """Remove the file, if there is one."""
        self.path.unlink(missing_ok=True)


def _is_torn(handle: int) -> bool:
    """Whether the file's last byte is not the end of a line.

    Another process's row may come in between: that row ends its own line, so at worst an empty line
    is left, which `rows` skips.
    """
    size = os.fstat(handle).st_size
    return size > 0 and os.pread(handle, 1, size - 1) != b"\n"


def _object(line: bytes) -> dict[str, Any] | None:
    """The line's JSON object; None if it is not one.

    No proper beginning of an object is one itself.
    """
    try:
        found = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one too
        return None
    return found if isinstance(found, dict) else None
