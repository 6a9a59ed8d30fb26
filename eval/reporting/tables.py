"""Tables that fit a terminal: numbers rounded to what they say, columns left out before any is cut.

A column that says the same in every row goes into a line below the table. If that is not enough,
the last columns are left out, and named there too; the CSV has all of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 100
"""Columns of a terminal that everybody has."""
DIGITS = 4
"""Significant digits of the largest number in a column."""
MOST_DECIMALS = 4
LONGEST_TEXT = 30
"""Longer texts wrap."""
_AROUND = 3
"""Columns that rich draws around a cell: a border and two spaces."""

Row = Mapping[str, Any]


class Column(NamedTuple):
    """One column as it is printed."""

    name: str
    cells: tuple[str, ...]
    is_text: bool

    @property
    def heading(self) -> str:
        """The name, with spaces where it may wrap."""
        return self.name.replace("_", " ")

    @property
    def says_something(self) -> bool:
        """Whether a value is neither empty nor zero."""
        return any(cell.strip("0.") for cell in self.cells)

    @property
    def wish(self) -> int:
        """Columns that it needs to wrap nothing."""
        return max(len(text) for text in (self.heading, *self.cells))

    @property
    def width(self) -> int:
        """Columns that it needs at least, without what is drawn around it."""
        longest = max((len(word) for word in self.heading.split()), default=1)
        for cell in self.cells:
            whole = len(cell) <= LONGEST_TEXT
            words = [cell] if whole else cell.split()
            longest = max(longest, *(len(word) for word in words), 1)
        return longest


class Fitted(NamedTuple):
    """A table that fits, and what it does not show."""

    columns: list[Column]
    notes: list[str]


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """All columns of a table as text; every row has those of the first."""
    made = []
    for name in rows[0]:
        values = [row.get(name, "") for row in rows]
        is_text = all(isinstance(value, str) for value in values)
        made.append(Column(name, tuple(texts(values)), is_text))
    return made


def texts(values: Sequence[Any]) -> list[str]:
    """A column's values as text: numbers that are not whole all with the same decimals."""
    broken = [value for value in values if isinstance(value, float) and math.isfinite(value)]
    decimals = _decimals(max((abs(value) for value in broken), default=0.0))
    while decimals > 1 and all(_text(value, decimals).endswith("0") for value in broken):
        decimals -= 1
    return [_text(value, decimals) for value in values]


def _decimals(largest: float) -> int:
    """Decimals that leave a number its significant digits."""
    if largest <= 0:
        return 1
    return min(MOST_DECIMALS, max(0, DIGITS - 1 - math.floor(math.log10(largest))))


def _text(value: Any, decimals: int) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if abs(value) >= 10**DIGITS:
        return f"{float(f'{value:.{DIGITS}g}'):,.0f}"
    shown = f"{value:,.{decimals}f}"
    return shown.removeprefix("-") if not shown.strip("-0.") else shown


def fitted(rows: Sequence[Row], width: int = WIDTH) -> Fitted:
    """The columns of a table that fit, and notes on the others."""
    columns = columns_of(rows)
    notes = []
    if len(rows) > 1:
        same = [column for column in columns if len(set(column.cells)) == 1]
        columns = [column for column in columns if column not in same]
        said = [f"{column.heading} {column.cells[0]}" for column in same if column.says_something]
        if said:
            notes.append(f"The same in every row: {', '.join(said)}")
    left_out = []
    while len(columns) > 1 and _needed(columns) > width:
        left_out.append(columns.pop().heading)
    if left_out:
        notes.append(f"In the CSV only: {', '.join(reversed(left_out))}")
    return Fitted(columns, notes)


def _needed(columns: Sequence[Column]) -> int:
    return sum(column.width + _AROUND for column in columns) + 1


def show(title: str, rows: Sequence[Row], file: TextIO | None = None) -> None:
    """Print a table of at most `WIDTH` columns, with its title above and notes below."""
    console = Console(width=WIDTH, file=file or sys.stdout, highlight=False)
    found = fitted(rows)
    table = Table()
    spare = WIDTH - _needed(found.columns)
    for column in found.columns:
        more = min(spare, column.wish - column.width)
        spare -= more
        table.add_column(
            escape(column.heading),
            justify="left" if column.is_text else "right",
            width=column.width + more,
        )
    for cells in zip(*(column.cells for column in found.columns), strict=True):
        table.add_row(*[escape(cell) for cell in cells])  # compilers print brackets too
    console.print(escape(title))
    console.print(table)
    for note in found.notes:
        console.print(escape(note))
