"""The files behind GGUF weights: which ones make up a model, mapping them, noticing changes."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.files import open_regular
from hybrimoe_plugin.weights.gguf_advice import about_folder, about_missing

IN_USE = "the weights file was changed while it is in use; load the model again"
_SPLIT = re.compile(r"^(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$")
"""The file names of a split set, as llama.cpp's `gguf-split` gives them."""


class FileIdentity(NamedTuple):
    """What changes when a file is written to, cut or replaced."""

    nbytes: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileIdentity:
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)

    def check(self, path: Path) -> None:
        """Raise WeightsError where the path no longer leads to the same file, unchanged."""
        try:
            found = FileIdentity.of(os.stat(path))
        except OSError as error:
            raise WeightsError(f"{path}: {IN_USE} ({error.strerror or error})") from None
        if found != self:
            raise WeightsError(f"{path}: {IN_USE} ({self._difference(found)})")

    def _difference(self, found: FileIdentity) -> str:
        if (found.inode, found.device) != (self.inode, self.device):
            return "replaced by another file"
        if found.nbytes != self.nbytes:
            return f"it has {found.nbytes} bytes and had {self.nbytes}"
        return "written to"


def map_file(path: Path) -> tuple[BinaryIO, mmap.mmap]:
    """The open file and its read-only mapping.

    Raises:
        WeightsError: it cannot be opened or is empty.
    """
    try:
        file = open_regular(path)
        try:
            return file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except BaseException:
            file.close()
            raise
    except ValueError:  # mmap refuses an empty file
        raise WeightsError(f"{path}: the file is empty") from None
    except OSError as error:
        reason = error.strerror or error
        advice = about_missing(path) if isinstance(error, FileNotFoundError) else ""
        raise WeightsError(f"{path}: cannot open the weights file ({reason}){advice}") from None


def close_files(files: Sequence[BinaryIO]) -> None:
    for file in files:
        file.close()


def read_into(file: BinaryIO, path: Path, start: int, view: memoryview) -> None:
    """Fill `view` from a file, from byte `start` on.

    Raises:
        WeightsError: it cannot be read, or ends too soon.

    Mutates: view.
    """
    done = 0
    try:
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done:]], start + done)
            if not count:
                raise WeightsError(f"{path}: {IN_USE} (it has become shorter)")
            done += count
    except OSError as error:
        reason = error.strerror or error
        raise WeightsError(f"{path}: cannot read the weights ({reason})") from None


def model_files(path: Path) -> list[Path]:
    """All files of the model that a path names: a file, part of a split set, or a directory.

    Raises:
        WeightsError: no file, several models, or a part of a split set missing.
    """
    if os.path.isdir(path):  # false for names that no file can have, where Path.is_dir raises
        path = _only_model(path)
    match = _SPLIT.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = []
    for part in range(1, count + 1):
        name = f"{match['stem']}-{part:05d}-of-{count:05d}.gguf"
        parts.append(path.with_name(name))
    missing = [part.name for part in parts if not part.exists()]
    if missing or count == 0:
        named = ", ".join(missing[:3]) or "all parts"
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightsError(f"{path}: the split set lacks {named}{more}")
    return parts


def _only_model(folder: Path) -> Path:
    """A file of the one model in a directory."""
    # macOS puts a file of this name beside each one, for what other file systems cannot store.
    files = [file for file in folder.glob("*.gguf") if not file.name.startswith("._")]
    files.sort()
    if not files:
        raise WeightsError(f"{folder}: no .gguf file in this directory{about_folder(folder)}")
    models = set()
    for file in files:
        match = _SPLIT.match(file.name)
        models.add(file.name if match is None else match["stem"])
    if len(models) > 1:
        names = ", ".join(sorted(models))
        raise WeightsError(f"{folder}: holds several models ({names}): name one file")
    return files[0]
