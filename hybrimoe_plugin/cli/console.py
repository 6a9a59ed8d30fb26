"""What the command says to people: answers and tables on stdout, notices on stderr."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 200
"""Columns when stdout is no terminal, so that tables are not cut for `grep`."""


def notice(text: str) -> None:
    """Tell the user something on stderr that is neither the answer nor an error."""
    print(f"hybrimoe: {' '.join(text.split())}", file=sys.stderr, flush=True)


def tables() -> Console:
    """A console on stdout for tables."""
    from rich.console import Console

    class Tables(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process with code 1
            raise BrokenPipeError

    out = io.StringIO() if sys.stdout is None else sys.stdout  # closed by `>&-`
    return Tables(
        file=out, width=None if out.isatty() else _PIPE_WIDTH, highlight=False, soft_wrap=False
    )
