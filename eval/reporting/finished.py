"""Cells that are measured once: an interrupted run's rows are taken by the next run."""

from __future__ import annotations

import hashlib
import logging
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.reporting import report
from eval.reporting.journal import Journal
from eval.reporting.rows import where

log = logging.getLogger(__name__)

Row = dict[str, Any]

CODE = {"eval": "*.py", "hybrimoe_plugin": "*.py", "optimize_rules": "*.yaml"}
"""Where the code lies that decides what a cell's numbers are."""


class Finished:
    """Finished rows of this machine, this code and this size.

    Others in the same file are left where they are. A row holds what was measured, which question
    and cell it belongs to, and beside that its conditions: the facts of `report.facts`, `quick`,
    and a digest of the code, because two different trees may both be `dirty`.

    Args:
        path: the journal's file.
        quick: whether this is a quick run, whose rows a full run must not take.
        fresh: remove what an earlier run left.
    """

    def __init__(self, path: Path, quick: bool, fresh: bool) -> None:
        self.path = path
        self._journal = Journal(path)
        if fresh:
            self._journal.clear()
        self._conditions: Row = {**report.facts(), "quick": quick, "code": code_digest()}
        self._rows: list[Row] = []
        others: set[str] = set()
        for row in self._journal.rows():
            differing = self._differences(row)
            others |= differing
            if not differing:
                self._rows.append(row)
        if others:
            names = ", ".join(sorted(others))
            log.warning(
                "%s: rows of other conditions are not taken, they differ in: %s", path, names
            )

    def find(self, **cell: Any) -> list[Row]:
        """Rows that have these values, oldest first."""
        return where(self._rows, **cell)

    def phases(self, *names: str, **cell: Any) -> list[Row] | None:
        """The newest row of each phase, in the order of `names`; None if one is missing."""
        newest = {row["phase"]: row for row in self.find(**cell)}
        if not set(names) <= set(newest):
            return None
        return [newest[name] for name in names]

    def add(self, row: Mapping[str, Any]) -> Row:
        """Save a row at once; gives it with its conditions, as it will be found again.

        Raises:
            OSError, TypeError: as `Journal.append`.
        """
        whole = {**row, **self._conditions}
        self._journal.append(whole)
        self._rows.append(whole)
        return whole

    def bare(self, row: Row) -> Row:
        """The row without its conditions, to be shown."""
        return {name: value for name, value in row.items() if name not in self._conditions}

    def _differences(self, row: Row) -> set[str]:
        """Conditions that are not this run's; a run may go on after midnight."""
        found = {name for name, value in self._conditions.items() if row.get(name) != value}
        return found - {"date"}


def add_fresh(parser: ArgumentParser) -> None:
    """`--fresh`, for questions that go on where an interrupted run stopped."""
    parser.add_argument(
        "--fresh", action="store_true", help="measure again what an interrupted run left in --out"
    )


def code_digest() -> str:
    """Twelve hexadecimal digits that change with the code."""
    digest = hashlib.sha256()
    for folder, pattern in CODE.items():
        for path in sorted((report.ROOT / folder).rglob(pattern)):
            digest.update(str(path.relative_to(report.ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
