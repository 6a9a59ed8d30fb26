"""What a cell of `eval.lever` is, and the columns of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from eval.lever.lab import Lab

Row = dict[str, Any]


class Cell(Protocol):
    """Something to run; `run` gives its rows."""

    @property
    def name(self) -> str: ...

    def run(self, lab: Lab) -> Iterator[Row]: ...


BLANK = {
    "target": "",
    "draft": "",
    "agreement": "",
    "prompt": "",
    "dram_share": "",
    "label": "measured",
    "tree": "",
    "tokens": "",
    "tokens_per_s": "",
    "acceptance_length": "",
    "passes": "",
    "rows": "",
    "draft_ms": "",
    "verify_ms": "",
    "wait_ms": "",
    "project_ms": "",
    "cycle_ms": "",
    "predicted_ms": "",
    "read_mb": "",
    "others_cpu": "",
}
"""Every row has these columns, in this order."""
