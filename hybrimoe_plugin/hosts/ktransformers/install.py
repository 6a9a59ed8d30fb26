"""Installs the pinned ktransformers without a compiler: its published Python files, unchanged.

The release is a source distribution whose set-up script compiles CUDA code. pip fetches it,
compares the hash and runs that script in a process where `setuptools.setup` drops the extensions; a
start-up module on that process's path sees to it. The result is a pure-Python wheel of unmodified
files. What was not compiled is provided at run time by `patches`.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from hybrimoe_plugin.errors import BackendError, ConfigError
from hybrimoe_plugin.hosts.ktransformers import startup
from hybrimoe_plugin.hosts.ktransformers.release import (
    SDIST_SHA256,
    TRANSFORMERS,
    VERSION,
    fits,
    how_to_install,
    installed,
)

_COMPILER = "#!/bin/sh\necho 'no compiler, release 12.4, nothing is built'\n"
"""The set-up script asks this for a release number, which goes into a name that is then not used.
"""


def install(*, force: bool = False) -> float:
    """Install the pinned release into the running environment.

    Args:
        force: replace another version, or a compiled one.

    Returns:
        seconds it took; 0 if it was there.

    Raises:
        ConfigError: this environment has another ktransformers, or a transformers that does not go
            with it.
        BackendError: pip could not fetch or build it; the file's hash is not the published one.
    """
    found = installed()
    if found == VERSION and not force:
        return 0.0
    if found is not None and not force:
        raise ConfigError(
            f"ktransformers {found} is installed here: uninstall it, or give --force to replace it"
        )
    _check_transformers()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hybrimoe-ktransformers-") as name:
        folder = Path(name)
        wheel = _build(folder)
        _pip({}, "install", "--no-deps", "--no-index", "--force-reinstall", str(wheel))
    return time.monotonic() - started


def _check_transformers() -> None:
    try:
        found = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return
    if not fits(found):
        raise ConfigError(
            f"ktransformers {VERSION} needs transformers=={TRANSFORMERS}, this environment has "
            f"{found}; make one of its own: {how_to_install()}"
        )


def _build(folder: Path) -> Path:
    """The pure-Python wheel, built in `folder`."""
    home = folder / "home"
    compiler = home / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(_COMPILER, encoding="utf-8")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    pinned = folder / "pinned.txt"
    pinned.write_text(f"ktransformers=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
    environment = {
        "PYTHONPATH": str(Path(startup.__file__).parent),
        "HYBRIMOE_NO_CUDA_HOME": str(home),
        # answers a question about this processor that concerns compiled code only
        "CPU_INSTRUCT": "AVX2",
    }
    # No cache: pip would later hand this wheel to somebody who wants the compiled one.
    flags = [
        "--no-deps",
        "--no-build-isolation",
        "--no-binary",
        "ktransformers",
        "--no-cache-dir",
        "--require-hashes",
    ]
    _pip(environment, "wheel", *flags, "--wheel-dir", str(folder), "--requirement", str(pinned))
    wheels = list(folder.glob("ktransformers-*.whl"))
    if len(wheels) != 1:
        raise BackendError(f"pip built {len(wheels)} wheels of ktransformers instead of one")
    return wheels[0]


def _pip(environment: Mapping[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        # pip's own error lines say what; a build's traceback stands before them.
        lines = [
            line
            for line in done.stderr.splitlines()
            if line.strip() and not line.startswith("WARNING")
        ]
        raise BackendError(
            f"pip {arguments[0]} of ktransformers {VERSION} failed: {' | '.join(lines[-6:])}"
        )
