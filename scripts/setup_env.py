"""Make an environment for the Makefile's targets.

    python scripts/setup_env.py [--dev | --oldest] [--venv DIR]

Needs nothing but Python's standard library. All but torch is installed in the versions of
scripts/requirements, each file compared with its hash; the oldest versions, which only tests use,
follow from the floors in pyproject.toml. On a machine without an NVIDIA GPU no CUDA package is
installed: torch is the CPU build, from wherever pip is set up to look, else through uv, which knows
PyTorch's own indexes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from hybrimoe_plugin import extras  # noqa: E402 (needs the standard library only)

LOCKS = ROOT / "scripts" / "requirements"
"""Exact versions and hashes of everything but torch; `scripts/lock.py` writes them."""
TORCH = "torch==2.13.0"
SEPARATE = {extra.part: extra for extra in extras.EXTRAS}
"""Lock -> a package that is installed without its dependencies. The project ships these locks."""


def main() -> int:
    """Make the environment unless it is up to date; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, help="where; .venv, or .venv-oldest with --oldest")
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    parser.add_argument(
        "--oldest", action="store_true", help="likewise, in the oldest versions that are allowed"
    )
    args = parser.parse_args()
    folder = args.venv or ROOT / (".venv-oldest" if args.oldest else ".venv")
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        found = ".".join(map(str, sys.version_info[:3]))
        print(
            f"set-up needs Python 3.10, 3.11 or 3.12, this is {found}: make PYTHON=python3.11",
            file=sys.stderr,
        )
        return 2
    dev, run = folder / ".hybrimoe-dev", folder / ".hybrimoe-run"
    stamp = dev if args.dev or args.oldest else run
    if _fresh(stamp) or _fresh(dev):  # what the tests need holds what a run needs
        return 0
    started = time.monotonic()
    say(f"environment in {folder.name}")
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    if args.oldest:
        install_torch(python)
        say("this project and its oldest libraries")
        constraint = folder / "constraints.txt"
        # Nothing below may replace torch by a build with CUDA.
        constraint.write_text("\n".join([TORCH, *_oldest()]) + "\n")
        pip(
            python,
            "install",
            "--constraint",
            str(constraint),
            "--editable",
            f"{ROOT}[test,figures]",
        )
    else:
        say("libraries")
        install_locked(python, "dev" if args.dev else "run")
        install_torch(python)
        say("this project")
        pip(python, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    install_locked(python, "demo")
    _install_kernels(python)
    stamp.touch()
    say(f"ready after {time.monotonic() - started:.0f} s")
    return 0


def _fresh(stamp: Path) -> bool:
    sources = (
        ROOT / "pyproject.toml",
        Path(__file__),
        Path(extras.__file__),
        *ROOT.glob("hybrimoe_plugin/**/*.c"),
        *locks(),
    )
    return stamp.exists() and all(
        stamp.stat().st_mtime >= source.stat().st_mtime for source in sources
    )


def floors() -> dict[str, str]:
    """Name -> oldest version, for each `name>=1.2` among what pyproject.toml asks for."""
    project = (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project]")[2]
    )  # 3.10 has no tomllib
    return dict(re.findall(r'"([\w.-]+)>=([\w.]+)', project))


def _oldest() -> list[str]:
    """Pins to the floors; torch is the one that is installed."""
    return [f"{name}=={floor}" for name, floor in floors().items() if name != "torch"]


def asked(*names: str) -> list[str]:
    """What pyproject.toml asks for under these names, as pip wants it."""
    known = floors()
    return [f"{name}>={known[name]}" for name in names]


def lock(name: str) -> Path:
    """The file of a lock: in the package where an installed wheel needs it too."""
    packaged = extras.LOCKS / f"{name}.txt"
    return packaged if packaged.exists() else LOCKS / f"{name}.txt"


def locks() -> list[Path]:
    """The files of all locks."""
    return [*LOCKS.glob("*.txt"), *extras.LOCKS.glob("*.txt")]


def install_locked(python: str, name: str) -> None:
    """Install what a lock names, in its versions and from files with its hashes only."""
    pip(
        python,
        "install",
        "--no-deps",
        "--require-hashes",
        "--requirement",
        str(lock(name)),
    )


def install_torch(python: str) -> None:
    """Install torch if it is missing: with CUDA where there is a GPU, else the CPU build."""
    gpu = shutil.which("nvidia-smi") is not None
    if (
        subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode
        == 0
    ):
        return
    say(f"torch, {'with CUDA' if gpu else 'CPU build'}")
    if gpu or _pip_would_take_cpu_build(python):
        pip(python, "install", TORCH)
        return
    install_locked(python, "uv")
    uv = [python, "-m", "uv", "pip", "install", "--python", python, "--torch-backend", "cpu", TORCH]
    if subprocess.run(uv, check=False).returncode:
        sys.exit(
            "no CPU build of torch could be installed; install one into .venv by hand and run "
            "this again"
        )


def _install_kernels(python: str) -> None:
    """Install kt-kernel where it has a wheel; elsewhere experts run on the torch reference."""
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
    ]
    command += ["--require-hashes", "--requirement", str(lock("kernels"))]
    refusal = extras.KERNELS.refusal()
    if refusal is not None or subprocess.run(command, check=False).returncode:
        say(
            f"{extras.KERNELS.requirement} cannot be installed here ({refusal or 'see above'}): "
            f"experts on the CPU will run on the slow torch reference"
        )


def _pip_would_take_cpu_build(python: str) -> bool:
    """Ask pip, without installing: a local version such as +cpu names the build."""
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--quiet",
        "--report",
        "-",
        TORCH,
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return bool(json.loads(answer.stdout)["install"][0]["metadata"]["version"].endswith("+cpu"))
    except (ValueError, LookupError):
        return False


def pip(python: str, *arguments: str) -> None:
    """Run pip; ends this process if it fails."""
    command = [python, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    if arguments[0] == "install":
        command.append("--no-compile")  # what is imported is compiled then; the rest never is
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"set-up stopped: pip {' '.join(arguments)} failed, see above")


def say(what: str) -> None:
    """Progress goes to stderr."""
    print(f"set-up: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
