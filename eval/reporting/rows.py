"""Pick rows of a table, and columns of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

Row = dict[str, Any]


def where(rows: Sequence[Row], /, **values: Any) -> list[Row]:
    """The rows that have all of these values, by column."""
    return [row for row in rows if has(row, **values)]


def has(row: Row, /, **values: Any) -> bool:
    """Whether a row has all of these values; a column that it lacks counts as None."""
    same = [row.get(name) == value for name, value in values.items()]
    return all(same)


def within(
    rows: Sequence[Row],
    name: str,
    values: Collection[Any],
) -> list[Row]:
    """The rows whose value in one column is one of several."""
    found = []
    for row in rows:
        if row[name] in values:
            found.append(row)
    return found


def column(rows: Sequence[Row], name: str) -> list[Any]:
    """One column's values, in the order of the rows."""
    return [row[name] for row in rows]


def distinct(rows: Sequence[Row], name: str) -> list[Any]:
    """One column's values, each once, in the order of their first row."""
    values = column(rows, name)
    return list(dict.fromkeys(values))
