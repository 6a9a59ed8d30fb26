"""The facts in every row: there on any machine, with git or without."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from eval.reporting import report

REFUSES = """#!/bin/sh
echo abc123
echo 'fatal: detected dubious ownership' >&2
exit 128
"""


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(report.COMMIT_VARIABLE, raising=False)


def test_facts_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    facts = report.facts()
    assert facts["commit"] == "unknown"
    names = {"torch", "triton", "transformers", "kt-kernel", "gpu", "driver", "date"}
    assert names <= set(facts)
    assert all(facts.values())


def test_commit_outside_of_a_repository(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "eval").mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit() == "unknown"


def test_commit_where_git_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    git = tmp_path / "git"
    git.write_text(REFUSES)
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git") == str(git)
    assert report.commit() == "unknown"


def test_commit_that_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(report.COMMIT_VARIABLE, "abc123\n")
    assert report.facts()["commit"] == "abc123"


def test_a_row_keeps_the_facts_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    saved = [
        {"ms": 1, "date": "2026-01-01"},
        {"ms": 2, "date": "2026-01-02"},
    ]
    report.save_csv(path, saved)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["date"] for row in rows] == ["2026-01-01", "2026-01-02"]
    header, *_ = path.read_text().splitlines()
    names = header.split(",")
    assert names.count("date") == 1
    assert all(row["commit"] for row in rows)
