"""Output for people: answers and tables on stdout, notices on stderr."""

from __future__ import annotations

import io
import logging
import sys
from typing import TYPE_CHECKING

from hybrimoe_plugin.files import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 100
"""Columns where stdout is no terminal."""


def notice(text: str) -> None:
    """Print one line on stderr: neither an answer nor an error."""
    print(f"hybrimoe: {one_line(text)}", file=sys.stderr, flush=True)


class LogLines(logging.Formatter):
    """Log messages, which may quote anything, like notices; tracebacks below them."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return "\n".join(printable(line.expandtabs()) for line in text.split("\n"))


def tables() -> Console:
    """A console on stdout for tables."""
    from rich.console import Console

    class Tables(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process with code 1
            raise BrokenPipeError

    # stdout is None where the shell closed it (`>&-`).
    out = io.StringIO() if sys.stdout is None else sys.stdout
    width = None if out.isatty() else _PIPE_WIDTH
    return Tables(file=out, width=width, highlight=False, soft_wrap=False)
