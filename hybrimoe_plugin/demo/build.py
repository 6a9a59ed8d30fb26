"""The demo model's file: built on first use, kept in the cache folder, checked before use."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path

from hybrimoe_plugin.cache_folder import found, place_for, write_atomic
from hybrimoe_plugin.demo.upcycle import FORMS, write_model
from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.weights.gguf_files import FileIdentity

log = logging.getLogger(__name__)

VERSION = 2
ROOM_BYTES = 800 << 20
"""More than either form takes: 692 MiB."""
_CHUNK_BYTES = 1 << 24
_SETTLED_NS = 4_000_000_000


def build_demo_model(
    form: str = "mixtral", *, progress: bool = True, rebuild: bool = False
) -> Path:
    """The demo model's GGUF, from the cache directory or built there first.

    It has the same bytes every time.

    Where the cache directory cannot be written, a folder for temporary files takes its place, with
    a notice.

    Raises:
        ConfigError: unknown form, or no place to put it.
        WeightsError: the source package is missing, or the disk failed.
    """
    if form not in FORMS:
        raise ConfigError(f"form: expected one of {', '.join(FORMS)}, found {form!r}")
    file = f"demo/SmolLM2-135M-{form}-v{VERSION}-Q8_0.gguf"
    kept = found(file)
    if kept is not None and not rebuild:
        if _is_whole(kept):
            return kept
        log.warning("%s is damaged; building it again", kept)
    path = place_for(file, ROOM_BYTES)
    try:
        _write_whole(form, path, progress)
    except OSError as error:
        raise WeightsError(
            f"{path}: the demo model cannot be written ({error.strerror or error}); set "
            "HYBRIMOE_CACHE to another folder"
        ) from error
    return path


def _write_whole(form: str, path: Path, progress: bool) -> None:
    """Build the model beside its place, and put it there when it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    part = Path(name)
    shape = FORMS[form]
    try:
        write_model(form, part, shape.experts, shape.top_k, progress)
        checksum = _sha256(part)
        part.replace(path)
        write_atomic(_sidecar(path), checksum)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _checked(path: Path) -> Path:
    """Holds the identity of the file that was found to have its checksum."""
    return path.with_suffix(".checked")


def _is_whole(path: Path) -> bool:
    """Whether the file has its checksum.

    Reading 692 MiB takes half a second or more, so it is done once for a file that stays as it is.

    Mutates: what `_checked` names.
    """
    try:
        identity = FileIdentity.of(os.stat(path))
        now = " ".join(map(str, identity))
        checksum = _sidecar(path).read_text()
        with contextlib.suppress(FileNotFoundError):
            if _checked(path).read_text() == f"{checksum} {now}":
                return True
        if checksum != _sha256(path):
            return False
    except (OSError, ValueError):
        return False
    # A file system's clock may have steps of a second or two: a later change could have this time.
    if time.time_ns() - identity.mtime_ns > _SETTLED_NS:
        with contextlib.suppress(OSError):  # the folder may be read-only
            write_atomic(_checked(path), f"{checksum} {now}")
    return True


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
