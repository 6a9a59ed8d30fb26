"""Rows that an earlier run finished: found again under the same conditions, and left else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from eval.reporting import finished, report
from eval.reporting.finished import Finished

PHASES = ("prefill", "decode")


def test_rows_of_other_conditions_are_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "rows.jsonl"
    facts = {"gpu": "A", "commit": "1", "date": "2026-01-01"}
    monkeypatch.setattr(report, "facts", lambda: dict(facts))
    monkeypatch.setattr(finished, "code_digest", lambda: "as it is")
    cell = {"model": "m", "cache": 0.5}
    for phase in PHASES:
        Finished(path, quick=True, fresh=False).add({**cell, "phase": phase})
    facts["date"] = "2026-01-02"
    found = Finished(path, True, False)
    assert found.phases(*PHASES, **cell) is not None, "after midnight"
    assert found.phases(*PHASES, model="m", cache=0.25) is None
    assert not caplog.records
    # A full run does not take a quick run's rows.
    with caplog.at_level(logging.WARNING):
        found = Finished(path, quick=False, fresh=False)
    assert found.find() == []
    assert "differ in: quick" in caplog.text
    # Nor does a run on another card, or of another commit.
    facts["gpu"] = "B"
    facts["commit"] = "2"
    found = Finished(path, True, False)
    assert found.find() == []
    assert "differ in: commit, gpu" in caplog.text
    # Nor one whose code differs, though git calls both trees the same.
    facts["gpu"] = "A"
    facts["commit"] = "1"
    monkeypatch.setattr(finished, "code_digest", lambda: "another")
    found = Finished(path, True, False)
    assert found.find() == []
    assert "differ in: code" in caplog.text
    assert path.exists()
    found = Finished(path, True, fresh=True)
    assert found.find() == []
    assert not path.exists()


def test_the_newest_row_of_a_phase_counts(tmp_path: Path) -> None:
    found = Finished(tmp_path / "rows.jsonl", quick=True, fresh=False)
    # A cell that was measured again has two rows of one phase.
    older = found.add({"model": "m", "phase": "a", "ms": 1})
    newer = found.add({"model": "m", "phase": "a", "ms": 2})
    other = found.add({"model": "m", "phase": "b", "ms": 3})
    assert found.phases("b", "a", model="m") == [other, newer]
    assert found.phases("a", "c", model="m") is None
    assert found.bare(older) == {"model": "m", "phase": "a", "ms": 1}


def test_the_code_s_digest_changes_with_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    path = tmp_path / "eval" / "more" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text("a = 1")
    before = finished.code_digest()
    path.write_text("a = 2")
    after = finished.code_digest()
    assert after != before
    (tmp_path / "eval" / "out.csv").write_text("1")
    assert finished.code_digest() == after
