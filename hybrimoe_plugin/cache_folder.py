"""Where what `kept_files` lists is kept, with a fallback for read-only homes."""

from __future__ import annotations

import contextlib
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
    """The path of the cache directory, which may not exist or be writable; creates nothing.

    `HYBRIMOE_CACHE` if it is set, else `hybrimoe` in `XDG_CACHE_HOME` or in the user's `.cache`.
    Without a home directory, the user's own folder for temporary files.
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
    _notice("there is no home directory: files are kept in the folder for temporary files")
    return _spare_path()


def place_for(name: str, nbytes: int) -> Path:
    """Where a large file can be written.

    Below the cache directory if that can be used, else, with a notice, below a folder for
    temporary files.

    Args:
        name: path relative to the cache directory. Its folder is created.
        nbytes: bytes that must be free there.

    Raises:
        ConfigError: neither folder can be used.
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
            f"can be written and has {-(-nbytes >> 20)} MiB free"
        )
    _notice(f"{reason}: {second.parent} is used instead")
    return second


def found(name: str) -> Path | None:
    """An existing file of this name, relative to one of `folders`; None where there is none."""
    for folder in folders():
        path = folder / name
        if os.path.exists(path):
            return path
    return None


def folders() -> list[Path]:
    """The cache directory and, where it exists, the folder that `place_for` falls back to."""
    first = cache_dir()
    try:
        spare = _owned(_spare_path())
        is_other = not os.path.exists(first) or not os.path.samefile(first, spare)
    except OSError:
        return [first]
    return [first, spare] if is_other else [first]


def spare_dir() -> Path:
    """The user's own folder for temporary files, created where it is missing.

    Raises:
        OSError: it cannot be created, or other users may write to it.
    """
    path = _spare_path()
    path.mkdir(mode=0o700, exist_ok=True)
    return _owned(path)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's text in one step: a reader finds either the old or the new one, whole.

    A new file can be read by its owner only; an old one's permissions stay.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name may have 255 bytes, and eight are added.
    prefix = os.fsdecode(os.fsencode(path.name)[:240])
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        with contextlib.suppress(FileNotFoundError):
            os.chmod(name, stat.S_IMODE(os.stat(path).st_mode))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def usable_triton_cache() -> None:
    """Give Triton another folder for compiled kernels where its own cannot be written.

    Mutates: the environment.
    """
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")
    reason = unusable(folder)
    if reason is None:
        return
    try:
        spare = spare_dir() / "hybrimoe-triton"
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
    """The folder itself, after checking that no other user can write to it.

    Raises:
        OSError: it is no folder, or another user may have put something there.
    """
    state = os.lstat(path)
    if not stat.S_ISDIR(state.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if hasattr(os, "getuid"):
        foreign = state.st_uid != os.getuid()
        writable_by_others = state.st_mode & 0o022
        if foreign or writable_by_others:
            raise PermissionError(errno.EPERM, "others may write to this folder", str(path))
    return path


def unusable(folder: Path, nbytes: int = 0) -> str | None:
    """Why a folder cannot take so many bytes; None if it can.

    Mutates: creates the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except FileExistsError:
        return f"{folder} is no folder"
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        return f"{folder} has {free >> 20} MiB free, {-(-nbytes >> 20)} MiB are needed"
    return None


@functools.cache
def _notice(text: str) -> None:
    """Log a warning, the same text once in a process."""
    log.warning("%s", text)
