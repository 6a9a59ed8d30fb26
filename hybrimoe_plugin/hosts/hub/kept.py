"""Models that are in the hub's cache already, found without a network."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.hosts.hub.choice import Asked, HubFile, choose, is_whole

_MOST_ENTRIES = 20_000


def kept_model(asked: Asked, cache: Path) -> Path | None:
    """The file or directory of a model that was fetched whole, of the newest commit that has it."""
    folder = cache / f"models--{asked.repository.replace('/', '--')}" / "snapshots"
    try:
        commits = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return None
    for commit in commits:
        files = _files(commit)
        try:
            choice = choose(asked, files)
        except HybriMoEError:
            continue
        if is_whole(choice):
            return commit if choice.is_directory else commit / choice.files[0].name
    return None


def _files(root: Path) -> list[HubFile]:
    """The files are links to contents that are complete."""
    paths = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return [
        HubFile(path.relative_to(root).as_posix(), path.stat().st_size)
        for path in sorted(islice(paths, _MOST_ENTRIES))
        if path.is_file()
    ]
