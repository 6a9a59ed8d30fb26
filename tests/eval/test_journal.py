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
    assert len(journal.path.read_bytes().splitlines()) == 2
    journal.clear()
    journal.clear()
    assert journal.rows() == []


def test_a_row_torn_anywhere_costs_only_itself(tmp_path: Path) -> None:
    whole = Journal(tmp_path / "whole.jsonl")
    whole.append({"row": 1})
    whole.append({"row": 2, "name": "é"})
    text = whole.path.read_bytes()
    first = text.index(b"\n") + 1
    for end in range(first, len(text) - 1):
        journal = Journal(tmp_path / f"torn-{end}.jsonl")
        journal.path.write_bytes(text[:end])
        assert journal.rows() == [{"row": 1}]
        journal.append({"row": 3})
        journal.append({"row": 4})
        assert journal.rows() == [{"row": 1}, {"row": 3}, {"row": 4}]


def test_a_row_that_lost_only_its_line_end_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    journal.path.write_bytes(b'{"row": 1}')
    journal.append({"row": 2})
    assert journal.rows() == [{"row": 1}, {"row": 2}]


def test_lines_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    journal.path.write_bytes(b'\n[1]\nnull\n7\nno json\n{"row": 1}\n\xff\xfe{"row"\n')
    assert journal.rows() == [{"row": 1}]


def test_part_of_a_row_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:4]))
    with pytest.raises(OSError, match="only 4 of"):
        journal.append({"row": 1})
    monkeypatch.undo()
    journal.append({"row": 2})
    assert journal.rows() == [{"row": 2}]


def test_processes_do_not_mix_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from pathlib import Path; from eval.reporting.journal import Journal\n"
        "for n in range(40): Journal(Path(sys.argv[1])).append({'who': sys.argv[2], 'n': n, "
        "'pad': 'x' * 9000})"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(path), who], cwd=report.ROOT)
        for who in ("a", "b", "c")
    ]
    assert [process.wait() for process in started] == [0, 0, 0]
    rows = Journal(path).rows()
    assert sorted((row["who"], row["n"]) for row in rows) == [
        (who, n) for who in "abc" for n in range(40)
    ]
    assert all(json.loads(line) for line in path.read_bytes().splitlines() if line)
