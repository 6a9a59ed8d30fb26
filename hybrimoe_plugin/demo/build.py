"""The demo model's file: built on first use, kept in the cache folder, checked before use."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

from hybrimoe_plugin.cache_folder import found, place_for, write_atomic
from hybrimoe_plugin.demo.upcycle import FORMS, write_model
from hybrimoe_plugin.errors import ConfigError, WeightsError

log = logging.getLogger(__name__)

VERSION = 2
ROOM_BYTES = 800 << 20
"""More than either form takes: 692 MiB."""
_CHUNK_BYTES = 1 << 24


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


def _is_whole(path: Path) -> bool:
    try:
        return _sidecar(path).read_text() == _sha256(path)
    except OSError:
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
