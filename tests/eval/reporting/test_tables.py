"""Tables of every question fit a terminal, and their numbers say no more than they know."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from eval.figures import RESULTS
from eval.reporting import report, tables

CSVS = sorted(RESULTS.glob("*.csv"))


def printed(rows: list[dict[str, object]]) -> str:
    out = io.StringIO()
    tables.show("a title", rows, out)
    return out.getvalue()


def cells(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [cell.strip() for line in lines for cell in line.strip("│").split("│")]


@pytest.mark.parametrize("path", CSVS, ids=lambda path: path.stem)
def test_committed_results_fit_a_terminal(path: Path) -> None:
    text = printed(report.read_csv(path))
    assert max(map(len, text.splitlines())) <= tables.WIDTH
    assert "…" not in text
    for cell in cells(text):
        assert not re.fullmatch(r"-?[\d.]+e[+-]?\d+", cell), cell
        if re.fullmatch(r"-?[\d,]+\.\d+", cell):
            digits = re.sub(r"\D", "", cell).lstrip("0")
            assert len(digits) <= tables.DIGITS, cell


def test_numbers_are_rounded_to_what_they_say() -> None:
    assert tables.texts([-7.4e-18, 0.25]) == ["0.00", "0.25"]
    assert tables.texts([1.23456, 60.92290]) == ["1.23", "60.92"]
    assert tables.texts([71979.667, 12163.2]) == ["71,980", "12,160"]
    assert tables.texts([12345, True, None, float("nan")]) == ["12,345", "True", "None", "nan"]
    assert tables.texts([0.1, 0.5, 0.75]) == ["0.10", "0.50", "0.75"]


def test_columns_are_left_out_before_one_is_cut() -> None:
    row = {f"a long heading {at}": "x" * 25 for at in range(6)}
    rows = [{**row, "same": 1, "zero": 0.0}, {**dict.fromkeys(row, "y" * 25), "same": 1}]
    rows[1]["zero"] = 0.0
    text = printed(rows)
    assert "x" * 25 in text and "In the CSV only: " in text
    assert "The same in every row: same 1" in text and "zero" not in text
    assert max(map(len, text.splitlines())) <= tables.WIDTH
