"""Build the wheel, install it as a user would, and run a chat and the examples from elsewhere.

    python scripts/try_wheel.py [--python PYTHON ...] [--tests]

Each interpreter gets an environment of its own in a temporary folder, which is removed at the end:
torch first (the CPU build where one can be had), then the wheel by pip's own resolver, then
`hybrimoe doctor --fix`. Needs the network, or an index that pip is set up to use.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import setup_env
from setup_env import ROOT

from hybrimoe_plugin import extras

PACKAGES = ("hybrimoe_plugin", "lever_ext", "optimize_rules")
QUESTION = "What is the capital of France?"
ANSWER = "Paris"
_COMPILED = (
    "from hybrimoe_plugin.policy.cache.adaptive import learn_token; print(learn_token);"
    "from hybrimoe_plugin.compute.cpu.native.kernels import operations; print(operations)"
)
TESTS = ("tests/policy", "tests/injection", "tests/weights", "tests/compute/test_backends.py")
"""What differs between versions of Python shows in these, in some minutes."""


class Failure(Exception):
    """A step went wrong; the message says which, and what it printed."""


def main() -> int:
    """Try the wheel with every interpreter; gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--python",
        nargs="+",
        default=[sys.executable],
        metavar="PYTHON",
        help="interpreters to install it for, names or paths; default: this one",
    )
    parser.add_argument(
        "--tests", action="store_true", help="also a part of the tests, against the installed files"
    )
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="hybrimoe-wheel-") as name:
        folder = Path(name)
        try:
            wheel = build(folder)
            for python in args.python:
                version = version_of(python)
                if version is None:
                    say(f"{python}: skipped, there is no such interpreter here")
                    continue
                say(f"Python {version}")
                attempt = folder / version
                attempt.mkdir()
                try_wheel(python, version, wheel, attempt, tests=args.tests)
                shutil.rmtree(attempt)
        except Failure as failure:
            say(str(failure))
            failed = True
    return 1 if failed else 0


def build(folder: Path) -> Path:
    """The wheel of a clean copy of the sources, after a look at what is in it.

    Raises:
        Failure: it cannot be built, or lacks a file.
    """
    source = folder / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so")  # the build compiles its own
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    step("build", [*command, "--wheel-dir", str(folder), str(source)], folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing = sorted(wanted - packed)
    if missing:
        raise Failure(f"the wheel lacks {', '.join(missing)}")
    return wheel


def _holds_compiled(wheel: Path) -> bool:
    """Whether there was a C compiler."""
    with zipfile.ZipFile(wheel) as archive:
        return any(name.endswith(".so") for name in archive.namelist())


def version_of(python: str) -> str | None:
    """The version of an interpreter; None where there is none of this name."""
    try:
        done = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # a version manager's stub fails when called
        return None
    return done.stdout.split()[-1]


def try_wheel(python: str, version: str, wheel: Path, folder: Path, *, tests: bool) -> None:
    """Install the wheel for one interpreter, and use it from a folder without the sources.

    Raises:
        Failure: a step failed, or an answer is wrong.
    """
    step("environment", [python, "-m", "venv", "env"], folder)
    commands = folder / "env" / "bin"
    own = str(commands / "python")
    install_torch(own)
    # What is imported is compiled then; the rest never is.
    install = [own, "-m", "pip", "install", "--quiet", "--no-compile"]
    step("wheel", [*install, f"{wheel}[test]" if tests else str(wheel)], folder)
    step("pip check", [own, "-m", "pip", "check"], folder)
    hybrimoe = str(commands / "hybrimoe")
    if _holds_compiled(wheel):
        # It is compiled once, and loads in every Python that the wheel is for.
        found = step("compiled parts", [own, "-c", _COMPILED], folder)
        expect("built-in function", found)
        expect("operations.abi3.so", found)
    for extra in extras.EXTRAS:
        _fix(hybrimoe, extra, version, folder)
    chat = [hybrimoe, "local_chat", "--demo", "--prompt", QUESTION]
    expect(ANSWER, step("chat", chat, folder))
    for example in ("quickstart.py", "lever.py"):
        shutil.copy(ROOT / "examples" / example, folder)
        expect(ANSWER, step(f"examples/{example}", [own, example], folder))
    if tests:
        for name in ("tests", "eval", "scripts", "docs"):
            shutil.copytree(ROOT / name, folder / name)
        shutil.copy(ROOT / "pyproject.toml", folder)
        command = [own, "-m", "pytest", "-q", "-m", "not slow", *TESTS]
        say(step("tests", command, folder).splitlines()[-1])


def _fix(hybrimoe: str, extra: extras.Extra, version: str, folder: Path) -> None:
    """Install what cannot be a dependency; where there is no wheel, the refusal must say so."""
    command = [hybrimoe, "doctor", "--fix", extra.part]
    known = extra.wheels is None or version.rpartition(".")[0] in extra.wheels.pythons
    if known:
        step(f"doctor --fix {extra.part}", command, folder)
        return
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    expect("cannot be installed here: its wheels are for Python", done.stderr)
    say(f"  {done.stderr.strip()}")


def install_torch(python: str) -> None:
    """The CPU build where one can be had, else the one with CUDA."""
    try:
        setup_env.install_torch(python)
    except SystemExit:
        say("  no CPU build of torch: taking the one with CUDA, some 3 GB")
        setup_env.pip(python, "install", setup_env.TORCH)


def step(name: str, command: Sequence[str], folder: Path) -> str:
    """Run a command in a folder without the sources; what it printed on stdout.

    Raises:
        Failure: its exit status is not 0.
    """
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{name} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    say(f"  {name}: {time.monotonic() - started:.0f} s")
    return done.stdout


def environment() -> Mapping[str, str]:
    """Without what would let the sources or another environment be found."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def expect(text: str, output: str) -> None:
    """Raises: Failure: the output does not have this text."""
    if text not in output:
        raise Failure(f"expected {text!r} in:\n{output}")


def say(what: str) -> None:
    print(f"wheel: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
