"""Rows and columns of tables, percentiles, and numbers read back from a CSV."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.reporting import report
from eval.reporting.quantiles import percentiles, times_ms
from eval.reporting.rows import column, distinct, has, where, within

ROWS = [
    {"trace": "qwen", "cache": 0.25, "ms": 3.0},
    {"trace": "gemma", "cache": 0.25, "ms": 2.0},
    {"trace": "qwen", "cache": 0.5, "ms": 1.0},
]


def test_rows_are_picked_by_all_values() -> None:
    first, second, third = ROWS
    qwen = where(ROWS, trace="qwen")
    assert qwen == [first, third]
    assert where(ROWS, trace="qwen", cache=0.25) == [first]
    assert where(ROWS, trace="mixtral") == []
    assert where(ROWS) == ROWS
    assert within(ROWS, "trace", ("gemma", "mixtral")) == [second]


def test_a_column_that_is_not_there_is_none() -> None:
    """Rows of one journal differ in their columns."""
    assert has({"ms": 1}, ms=1, note=None)
    assert not has({"ms": 1}, note="slow")
    assert where(ROWS, note="slow") == []


def test_columns_keep_the_order_of_the_rows() -> None:
    assert column(ROWS, "ms") == [3.0, 2.0, 1.0]
    assert distinct(ROWS, "trace") == ["qwen", "gemma"]


def test_percentiles_of_one_value_are_that_value() -> None:
    assert percentiles([4.0]) == (4.0, 4.0, 4.0)
    found = times_ms([4000.0])
    assert found == {
        "p20_ms": 4.0,
        "p50_ms": 4.0,
        "p80_ms": 4.0,
        "repetitions": 1,
    }


def test_percentiles_are_interpolated() -> None:
    low, middle, high = percentiles([0.0, 10.0])
    assert low == pytest.approx(2.0)
    assert middle == pytest.approx(5.0)
    assert high == pytest.approx(8.0)


def test_a_csv_comes_back_with_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    saved = {"name": "ours", "count": 3, "ms": 0.5, "emulated": True, "note": ""}
    report.save_csv(path, [saved])
    (row,) = report.read_csv(path)
    for name, value in saved.items():
        assert row[name] == value
    assert row["emulated"] is True
