"""`hybrimoe cache`: list what is kept on disk between runs, and remove it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from hybrimoe_plugin.cache_folder import cache_dir, unusable
from hybrimoe_plugin.cli.console import notice
from hybrimoe_plugin.cli.flags import add_switch
from hybrimoe_plugin.errors import ConfigError, did_you_mean
from hybrimoe_plugin.files import human, printable
from hybrimoe_plugin.kept_files import KINDS, Kept, kept_files, remove

_AGES = (("day", 86400), ("hour", 3600), ("minute", 60))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "clear"),
        default="list",
        metavar="ACTION",
        help="list what is kept (default), or clear it",
    )
    names = ", ".join(kind.name for kind in KINDS)
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"of these kinds only: {names}; default: all"
    )
    add_switch(parser, "yes", "remove without asking")


def run(args: argparse.Namespace) -> int:
    """List or remove files of the cache folder.

    Raises:
        ConfigError: an unknown kind, nobody there to confirm a removal, or files that cannot be
            removed.
    """
    known = [kind.name for kind in KINDS]
    for name in args.kinds:
        if name not in known:
            raise ConfigError(
                f"cache: expected kinds among {', '.join(known)}, found {name!r}"
                f"{did_you_mean(name, known)}"
            )
    _say_if_unusable(cache_dir())
    files = kept_files(args.kinds)
    if args.action == "clear":
        _clear(files, args.yes)
        return 0
    _show(files)
    if files:
        print(f"{_total(files)} in all; `hybrimoe cache clear [KIND ...]` removes them")
    return 0


def _say_if_unusable(folder: Path) -> None:
    """A folder that is not there yet is no reason, and is not made."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    reason = unusable(there) if there == folder or not there.is_dir() else None
    if reason is not None:
        notice(f"the cache folder {folder} cannot be used: {reason} (HYBRIMOE_CACHE names another)")


def _show(files: Sequence[Kept]) -> None:
    """Print a paragraph for each kind, with a line for each thing."""
    if not files:
        print("nothing is kept")
    for root, below in groupby(files, key=lambda file: file.root):
        print(f"{printable(str(root))}\n")
        of_root = list(below)
        for kind in KINDS:
            own = [file for file in of_root if file.kind == kind.name]
            if own:
                print(f"{kind.name}: {kind.purpose}")
                _show_groups(own)
                print()


def _show_groups(files: Sequence[Kept]) -> None:
    for group in sorted({file.group for file in files}):
        own = [file for file in files if file.group == group]
        size = human(sum(file.nbytes for file in own))
        age = _age(max(file.modified for file in own))
        name = _count(own) if group == own[0].kind else group
        print(f"  {size:>10}  {age:>14}  {name}")


def _count(files: Sequence[Kept]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"


def _total(files: Sequence[Kept]) -> str:
    return f"{_count(files)}, {human(sum(file.nbytes for file in files))}"


def _age(modified: float) -> str:
    seconds = max(0.0, time.time() - modified)
    for unit, length in _AGES:
        count = int(seconds // length)
        if count:
            return f"{count} {unit}{'s' if count > 1 else ''} old"
    return "new"


def _clear(files: Sequence[Kept], sure: bool) -> None:
    """Remove files once the user agrees.

    Raises:
        ConfigError: nobody is there to be asked, or files cannot be removed.
    """
    if not files:
        notice("nothing to remove")
        return
    if not sure:
        _need_terminal()
        _show(files)
        if not _confirmed(f"Remove {_total(files)}? [y/N] "):
            notice("nothing was removed")
            return
    failures = remove(files)
    if failures:
        first = failures[0]
        raise ConfigError(
            f"{len(failures)} of {len(files)} files could not be removed, such as "
            f"{first.filename}: {first.strerror}"
        )
    notice(f"removed {_total(files)}")


def _need_terminal() -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError("cache clear asks before it removes anything; without a terminal: --yes")


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False
