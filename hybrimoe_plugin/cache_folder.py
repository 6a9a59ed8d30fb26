"""Where profiles, tuned kernels and demo models are kept, and what happens where nothing can be
kept.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

from hybrimoe_plugin.errors import ConfigError

log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """The cache directory; nothing is made, and it need not be writable.

    `HYBRIMOE_CACHE`, else `hybrimoe` in `XDG_CACHE_HOME` or in the user's `.cache`; without a home
    directory, a folder of the user's own for temporary files.
    """
    own = os.environ.get("HYBRIMOE_CACHE")
    if own:
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "hybrimoe"
    if base:
        _notice(f"XDG_CACHE_HOME is {base!r}, which is no absolute path: it is ignored")
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        return Path(home) / ".cache" / "hybrimoe"
    _notice(
        "there is no home directory: what would be kept there goes to the folder for temporary "
        "files"
    )
    return _spare_path()


def place_for(name: str, nbytes: int) -> Path:
    """Where a large file can be made: below the cache directory, or below a folder for temporary
    files, with a notice.

    Args:
        name: relative to the cache directory. Its folder is made.
        nbytes: that must be free.

    Raises:
        ConfigError: neither can be used.
    """
    first = cache_dir() / name
    reason = unusable(first.parent, nbytes)
    if reason is None:
        return first
    try:
        second = spare_dir() / name
        spare_reason = unusable(second.parent, nbytes)
    except OSError as error:
        spare_reason = str(error)
    if spare_reason is not None:
        raise ConfigError(
            f"no place for {name}: {reason}; {spare_reason}. Set HYBRIMOE_CACHE to a folder that "
            f"can be written and "
            f"has {-(-nbytes >> 20)} MiB free"
        )
    _notice(f"{reason}: {second.parent} is used instead")
    return second


def found(name: str) -> Path | None:
    """A file below the cache directory or, failing that, below the folder that `place_for` falls
    back to.
    """
    return next((folder / name for folder in folders() if os.path.exists(folder / name)), None)


def folders() -> list[Path]:
    """The cache directory and, where it exists, the folder that `place_for` falls back to."""
    try:
        return [cache_dir(), _owned(_spare_path())]
    except OSError:
        return [cache_dir()]


def spare_dir() -> Path:
    """A folder of the user's own for temporary files, made where there is none.

    Raises:
        OSError: it cannot be made, or others could have put something there.
    """
    path = _spare_path()
    path.mkdir(mode=0o700, exist_ok=True)
    return _owned(path)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the new one, whole. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def usable_triton_cache() -> None:
    """Give Triton another folder for compiled kernels where its own cannot be written. Mutates: the
    environment.
    """
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")
    reason = unusable(folder)
    if reason is None:
        return
    try:
        spare = spare_dir() / "triton"
        os.environ["TRITON_CACHE_DIR"] = str(spare)
        _notice(f"{reason}: Triton's compiled kernels are kept in {spare}")
    except OSError as error:
        log.warning(
            "%s, and %s: Triton may not be able to compile its kernels; set TRITON_CACHE_DIR",
            reason,
            error,
        )


def _spare_path() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"hybrimoe-cache-{user}"


def _owned(path: Path) -> Path:
    """The folder, if nobody else can have put anything into it. Raises: OSError."""
    state = os.lstat(path)
    if not stat.S_ISDIR(state.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
        raise PermissionError(errno.EPERM, "others may write to this folder", str(path))
    return path


def unusable(folder: Path, nbytes: int = 0) -> str | None:
    """Why a folder cannot take so many bytes; None if it can. Mutates: makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        return f"{folder} has {free >> 20} MiB free, {-(-nbytes >> 20)} MiB are needed"
    return None


@functools.cache
def _notice(text: str) -> None:
    """A warning, once in a process."""
    log.warning("%s", text)
