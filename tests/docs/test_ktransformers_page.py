"""docs/ktransformers.md shows the table that errors and the translation read."""

from __future__ import annotations

from pathlib import Path

from hybrimoe_plugin.injection.ktransformers_classes import KWARGS, MODELS, OPERATORS, Fate, Moved

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ktransformers.md"


def operator_row(row: Moved) -> str:
    names = ", ".join(f"`{name}`" for name in row.names) or "all"
    words = {
        Fate.OPERATOR: f"`{row.text}`",
        Fate.AUTOMATIC: f"left out: {row.text}",
        Fate.REFUSED: f"not supported: {row.text}",
    }
    return f"| `{row.module}` | {names} | {row.since} | {words[row.fate]} |"


def rows() -> list[str]:
    """All rows of the page's tables about rules, in their order."""
    found = [operator_row(row) for row in OPERATORS]
    found += [f"| `{name}` | left out: {text} |" for name, text in KWARGS.items()]
    for theirs, kind in MODELS.items():
        here = f"`transformers.models.{kind}.modeling_{kind}`"
        found.append(f"| `ktransformers.models.{theirs}` | {here} |")
    return found


def test_the_page_has_the_tables_rows() -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    shown = [line for line in page if line in rows()]
    assert shown == rows()
