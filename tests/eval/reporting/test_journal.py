"""Rows of the journal: whole ones come back, torn ones do not, and processes do not mix theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.reporting import report
from eval.reporting.journal import Journal

WRITES = """
import sys
from pathlib import Path
from eval.reporting.journal import Journal

journal = Journal(Path(sys.argv[1]))
for number in range(40):
    journal.append({"who": sys.argv[2], "n": number, "pad": "x" * 9000})
"""
"""A process that writes rows of several pages."""


def test_rows_come_back_in_their_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new folder" / "rows.jsonl")
    assert journal.rows() == []
    rows: list[dict[str, Any]] = [
        {"stage": "kernels", "ms": 0.1 + 0.2, "name": "Größe\nsecond line"},
        {"stage": "slots", "ok": None},
    ]
    for row in rows:
        journal.append(row)
    assert journal.rows() == rows
    lines = journal.path.read_bytes().splitlines()
    assert len(lines) == 2
    journal.clear()
    journal.clear()  # a second time it is not there
    assert journal.rows() == []


def test_a_row_torn_anywhere_costs_only_itself(tmp_path: Path) -> None:
    """The file is cut at every byte of its second row."""
    whole = Journal(tmp_path / "whole.jsonl")
    whole.append({"row": 1})
    whole.append({"row": 2, "name": "é"})
    text = whole.path.read_bytes()
    first = text.index(b"\n") + 1
    for end in range(first, len(text) - 1):
        torn = text[:end]
        journal = Journal(tmp_path / f"torn-{end}.jsonl")
        journal.path.write_bytes(torn)
        assert journal.rows() == [{"row": 1}]
        # What is written next begins on a line of its own.
        journal.append({"row": 3})
        journal.append({"row": 4})
        numbers = [row["row"] for row in journal.rows()]
        assert numbers == [1, 3, 4]


def test_a_row_that_lost_only_its_line_end_counts(tmp_path: Path) -> None:
    """It is whole: nothing of the object is missing."""
    journal = Journal(tmp_path / "rows.jsonl")
    journal.path.write_bytes(b'{"row": 1}')
    journal.append({"row": 2})
    assert journal.rows() == [{"row": 1}, {"row": 2}]


def test_lines_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    journal.path.write_bytes(b'\n[1]\nnull\n7\nno json\n{"row": 1}\n\xff\xfe{"row"\n')
    assert journal.rows() == [{"row": 1}]


def test_part_of_a_row_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    write = os.write

    def four_bytes(
        handle: int,
        data: bytes,
    ) -> int:
        return write(handle, data[:4])

    monkeypatch.setattr(os, "write", four_bytes)
    with pytest.raises(OSError, match="only 4 of"):
        journal.append({"row": 1})
    monkeypatch.undo()
    journal.append({"row": 2})
    assert journal.rows() == [{"row": 2}]


def test_processes_do_not_mix_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    started = []
    for who in "abc":
        command = [sys.executable, "-c", WRITES, str(path), who]
        started.append(subprocess.Popen(command, cwd=report.ROOT))
    for process in started:
        assert process.wait() == 0
    written = [(who, number) for who in "abc" for number in range(40)]
    rows = Journal(path).rows()
    found = [(row["who"], row["n"]) for row in rows]
    assert sorted(found) == written
    for line in path.read_bytes().splitlines():
        assert not line or json.loads(line)
