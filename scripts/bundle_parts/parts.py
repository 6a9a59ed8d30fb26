"""What a bundle consists of, how large it may be, and what every part of the script needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from setup_env import ROOT

LIMIT_BYTES = 60_000_000
PYTHON = "3.12"
"""What the GPU machines have."""


class Part(NamedTuple):
    """Something in the bundle."""

    name: str
    bytes: int
    note: str = ""


class BundleError(Exception):
    """The bundle cannot be built as asked."""


def listed(site: Path) -> list[Part]:
    """The packages of a bundle."""
    return [Part(f"site/{path.name}", size_of(path)) for path in sorted(site.iterdir())]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path, *path.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def show(parts: Sequence[Part]) -> None:
    """Print each part's size, and the size of all."""
    for part in parts:
        size = f"{part.bytes / 1e6:7.2f} MB" if part.bytes else " " * 10
        note = f": {part.note}" if part.note else ""
        print(f"{size}  {part.name}{note}")
    total = sum(part.bytes for part in parts)
    print(f"{total / 1e6:7.2f} MB  together")


def check_size(parts: Sequence[Part], limit: int = LIMIT_BYTES) -> None:
    """Check the size of all parts together.

    Raises:
        BundleError: they are larger than the limit.
    """
    total = sum(part.bytes for part in parts)
    if total > limit:
        largest = max(parts, key=lambda part: part.bytes)
        raise BundleError(
            f"the bundle has {total / 1e6:.1f} MB, more than the {limit / 1e6:.0f} MB allowed; "
            f"the largest part is {largest.name} with {largest.bytes / 1e6:.1f} MB. "
            "Fewer --variants or --seconds make it smaller"
        )


def fresh(out: Path) -> None:
    """An empty folder; only one that an earlier run made is emptied."""
    if out.exists() and any(out.iterdir()) and not (out / "site").is_dir():
        raise BundleError(f"{out} is not empty and holds no bundle: give another --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "site").mkdir(parents=True)


def shown(path: Path) -> str:
    """The path, from the current folder if it lies in it."""
    path = path.resolve()
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def say(what: str) -> None:
    """Progress goes to stderr: with --use the shell reads stdout."""
    print(f"gpu_bundle: {what}", file=sys.stderr, flush=True)


def can(python: str, modules: str, statement: str = "") -> bool:
    """Whether an interpreter runs, imports these modules, and then runs a statement."""
    command = [python, "-c", f"import {modules}\n{statement}"]
    try:
        done = subprocess.run(command, capture_output=True, check=False, cwd=ROOT.parent)
    except OSError:
        return False
    return done.returncode == 0
