"""Makes an environment for classic kTransformers beside the one that runs this.

That release pins an old transformers. So the environment has libraries of its own, in locked
versions, and shares only what it does not have: torch, kt-kernel and this project, which it finds
in the running environment. Nothing large is fetched or stored twice.
"""

from __future__ import annotations

import hashlib
import os
import site
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.extras import LOCKS
from hybrimoe_plugin.hosts.ktransformers.release import MADE, SDIST_SHA256, TRANSFORMERS, installed

LOCK = LOCKS / "ktransformers.txt"
"""Versions and hashes of its libraries, torch apart; `scripts/lock.py` of the sources writes it."""

_SHARED = "hybrimoe-shared.pth"
_COMMAND = """#!{python}
import sys
from hybrimoe_plugin.cli.main import main
sys.exit(main())
"""


def make(folder: Path) -> float:
    """Make the environment, or renew one that was made earlier or left unfinished.

    Args:
        folder: where; empty, missing, or from an earlier call.

    Returns:
        seconds it took; 0 if it was up to date.

    Raises:
        ConfigError: something else is in the folder, or this environment is itself a classic one.
        BackendError: pip is missing or could not fetch a file, or its hash is another one.
    """
    if installed() is not None:
        raise ConfigError(
            f"--venv {folder}: ktransformers is installed in this environment, and one of its own "
            "shares its libraries: run this where the default host is"
        )
    folder = folder.absolute()
    stamp = folder / MADE
    if folder.exists() and not stamp.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--venv {folder}: something else is there; name a new folder")
    if is_current(folder):
        return 0.0
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    # Unfinished from here to the end: the next call makes it anew, whatever interrupts this one.
    stamp.write_text("", encoding="utf-8")
    try:
        venv.create(folder, symlinks=True, with_pip=True)
    except subprocess.CalledProcessError as error:  # Debian has ensurepip in a package of its own
        raise BackendError(f"no environment with pip can be made by {sys.executable}") from error
    python = str(folder / "bin" / "python")
    _shared(folder).unlink(missing_ok=True)  # pip would take what it shares for installed
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-compile", "--require-hashes", "--requirement", str(LOCK)]
    _run(pip, f"pip could not install transformers=={TRANSFORMERS} and what it needs")
    _share(folder)
    _run(
        [python, "-m", "hybrimoe_plugin", "install_ktransformers", "--force"],
        "ktransformers could not be installed",
    )
    stamp.write_text(_state(), encoding="utf-8")
    return time.monotonic() - started


def is_current(folder: Path) -> bool:
    """Whether there is a finished environment, made from what is here now."""
    stamp = folder / MADE
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == _state()


def _share(folder: Path) -> None:
    """Let the new environment find what it lacks in this one, and give it the command."""
    lines = [f"import site; site.addsitedir({place!r})\n" for place in _places()]
    _shared(folder).write_text("".join(lines), encoding="utf-8")
    command = folder / "bin" / "hybrimoe"
    command.write_text(_COMMAND.format(python=folder / "bin" / "python"), encoding="utf-8")
    command.chmod(0o755)


def _shared(folder: Path) -> Path:
    """The file by which Python finds the packages that are shared, after its own."""
    return Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(folder)})) / _SHARED


def _places() -> list[str]:
    """Folders with this environment's packages."""
    found = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        found.append(site.getusersitepackages())
    return list(dict.fromkeys(found))


def _state() -> str:
    """What the environment was made from; its first line is the environment that it shares."""
    lock = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    return "\n".join([sys.prefix, *_places(), lock, SDIST_SHA256, ""])


def _run(command: list[str], problem: str) -> None:
    """Run a program of the new environment. Raises: BackendError: it failed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise BackendError(f"{problem}: {' | '.join(lines[-4:]) or done.returncode}")
