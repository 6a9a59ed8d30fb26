"""A bar for prompts that take long."""

from __future__ import annotations

import sys
from typing import Any

_DELAY_S = 1.0
"""Shorter prompts show no bar."""


def prompt_bar(tokens: int, shown: bool) -> Any:
    """A bar of tqdm on stderr that is removed when it is closed.

    Args:
        tokens: of the prompt, to compute.
        shown: whether somebody wants to see it.
    """
    from tqdm import tqdm

    seen = shown and sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        total=tokens,
        desc="prompt",
        unit="token",
        leave=False,
        delay=_DELAY_S,
        disable=not seen,
        file=sys.stderr,
    )
