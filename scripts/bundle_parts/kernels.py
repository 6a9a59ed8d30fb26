"""Compiled kernels: made by `eval.kernel_prebuild`, checked, and moved to another machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import setup_env
from setup_env import ROOT

from bundle_parts.parts import PYTHON, BundleError, Part, can, say, size_of

TRITON = "triton==3.6.0"
"""What the GPU machines have: the compiled kernels serve this release of it alone."""


def find_python(given: str | None, folder: Path) -> tuple[str | None, str]:
    """(a Python with the GPU machine's Triton, "") or (None, why there is none).

    Args:
        given: taken if it will do; otherwise an environment is made in `folder`.
    """
    here = [sys.executable]
    on_path = shutil.which(f"python{PYTHON}")
    if on_path is not None:
        here.append(on_path)
    for python in here if given is None else [given, *here]:
        if _will_do(python):
            return python, ""
    if given is not None:
        return None, f"{given} is not Python {PYTHON} with {TRITON}, torch and gguf"
    for python in here:
        if _is_version(python):
            return _environment(python, folder / "venv")
    return None, f"no Python {PYTHON} here; --python names one that has {TRITON} and torch"


def _environment(base: str, folder: Path) -> tuple[str | None, str]:
    """As `find_python`, in a fresh environment."""
    say(f"an environment with {TRITON} (a minute or two)")
    python = str(folder / "bin" / "python")
    try:
        subprocess.run([base, "-m", "venv", str(folder)], check=True, capture_output=True)
        setup_env.install_torch(python)
        setup_env.pip(python, "install", "--no-deps", TRITON)
        setup_env.pip(python, "install", *setup_env.asked("gguf", "numpy", "psutil", "pyyaml"))
    except (subprocess.CalledProcessError, SystemExit) as error:
        return None, f"no environment with {TRITON} could be made: {error}"
    if not _will_do(python):
        return None, f"{TRITON} does not work in a fresh environment here"
    return python, ""


def _is_version(python: str) -> bool:
    """Whether it is the GPU machine's version of Python."""
    major, minor = PYTHON.split(".")
    return can(python, "sys", f"assert sys.version_info[:2] == ({major}, {minor})")


def _will_do(python: str) -> bool:
    """Whether it has the GPU machine's versions, and what compiling needs."""
    _, _, version = TRITON.partition("==")
    check = f"assert triton.__version__ == {version!r}"
    return _is_version(python) and can(python, "torch, triton, gguf", check)


def prebuild(python: str, cache: Path, manifest: Path, arch: int, seconds: float) -> Part:
    """Compile into `cache`, and check that another machine would find everything there.

    A fresh process asks for all kernels again in a copy in another folder.

    Args:
        manifest: file for what identifies the cache.
        arch: compute capability, 90 for an H100.
        seconds: no group of kernels is begun after this long.

    Raises:
        BundleError: a kernel could not be compiled, or would not be found there.
    """
    say(f"kernels for compute capability {arch / 10}, {seconds / 60:.0f} minutes at most")
    flags = ["--arch", str(arch), "--seconds", str(seconds)]
    made = run_prebuild(python, cache, flags)
    drop_sources(cache)
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-elsewhere-") as name:
        copy = Path(name) / "triton"
        shutil.copytree(cache, copy)
        relocate(copy)
        say(
            "every kernel again, in fresh processes and from another folder: nothing may be "
            "compiled"
        )
        for item in made["left_out"]:
            flags += ["--skip", item]
        again = run_prebuild(python, copy, flags)
    missed = cache_report(made, again)
    manifest.write_text(json.dumps(made, indent=1), encoding="utf-8")
    return Part("triton", size_of(cache), missed)


def run_prebuild(python: str, cache: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Run `eval.kernel_prebuild`; gives its JSON line.

    Raises:
        BundleError: it ended with an error.
    """
    command = [python, "-m", "eval.kernel_prebuild", "--cache", str(cache.resolve()), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT, check=False
    )
    if done.returncode:
        raise BundleError("the kernels could not be compiled, see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cache_report(made: dict[str, Any], again: dict[str, Any]) -> str:
    """What was compiled, and what was not, in words.

    Raises:
        BundleError: the second run had to compile something.
    """
    if again["compiled"] or again["launchers_built"]:
        built = [f"{count} {name}" for name, count in again["compiled"].items()]
        kernels_built = ", ".join(built) or "no kernel"
        launchers = again["launchers_built"]
        raise BundleError(
            f"a GPU machine would not find everything in the cache: {kernels_built} and "
            f"{launchers} launchers were compiled again"
        )
    kernels = sum(made["compiled"].values())
    what = f"{kernels} kernels and {made['launchers_built']} launchers"
    said = [f"{what}; all {again['hits']} found in fresh processes"]
    if made["launcher_problem"]:
        reason = made["launcher_problem"]
        said.append(f"launchers left out ({reason}): a C compiler is needed there")
    if made["failed"]:
        said.append(f"{len(made['failed'])} did not compile")
    if made["left_out"]:
        names = "; ".join(made["left_out"])
        said.append(f"left out for want of time: {names}")
    return ", ".join(said)


def drop_sources(cache: Path) -> None:
    """Remove what a hit does not read: only metadata and binaries are."""
    for path in cache.rglob("*.source"):
        path.unlink()


def relocate(cache: Path) -> int:
    """Let the absolute paths in the cache point to where its files are now.

    Triton notes them for each kernel.

    Returns:
        the number of kernels.
    """
    groups = list(cache.glob("*/__grp__*.json"))
    for group in groups:
        names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        paths = [group.parent / name for name in names]
        here = {path.name: str(path.resolve()) for path in paths if path.exists()}
        group.write_text(json.dumps({"child_paths": here}), encoding="utf-8")
    return len(groups)
