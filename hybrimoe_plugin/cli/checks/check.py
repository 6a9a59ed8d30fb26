"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """Something that was checked; `ok` is None where it is neither good nor bad."""

    name: str
    ok: bool | None
    detail: str
