"""Bounded reading of files from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrimoe_plugin.files import read_regular


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 2048)
    assert read_regular(path, 2048) == b"a" * 2048
    with pytest.raises(OSError, match="larger than the 1 KiB"):
        read_regular(path, 1024)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path, 1024)
    with pytest.raises(OSError, match="null"):
        read_regular("a\0b", 1024)
