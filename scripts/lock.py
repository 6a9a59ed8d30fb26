"""Choose the versions that set-up installs, with the hashes of their files.

    python scripts/lock.py [--upgrade]

Needs uv on the path or as a module. Writes scripts/requirements/*.txt, one for each environment,
and hybrimoe_plugin/requirements/*.txt, which an installed wheel needs too; for Python
3.10 to 3.12 and every platform. torch is not in them: its builds for CPU, CUDA and others have the
same version and other hashes, and which one is right is found at set-up. What torch needs itself is
in them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys

from setup_env import LOCKS, ROOT, SEPARATE, lock
from setup_ktransformers import DEV, LIBRARIES

TORCH_NEEDS = (
    "filelock",
    "fsspec",
    "jinja2",
    "networkx>=2.5.1",
    "sympy>=1.13.3",
    "typing-extensions>=4.10",
)
BUILD = ("setuptools>=77.0.3",)
"""Builds this project's own wheel; torch needs it too from Python 3.12 on."""


def wanted() -> dict[str, list[str]]:
    """Name of a lock -> what it must provide.

    That is what pyproject.toml and the set-up scripts ask for.
    """
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    run = [
        *_listed(project, "dependencies"),
        *_listed(project, "serve"),
        *TORCH_NEEDS,
        *BUILD,
    ]
    extras = [entry for extra in ("figures", "test", "dev") for entry in _listed(project, extra)]
    classic = [*LIBRARIES, *TORCH_NEEDS]
    return {
        "dev": [*run, *extras],
        "run": run,
        "ktransformers-dev": [*classic, *DEV],
        "ktransformers": classic,
        "uv": ["uv"],
        **{name: [extra.requirement] for name, extra in SEPARATE.items()},
    }


def main() -> int:
    """Write the locks; gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--upgrade",
        action="store_true",
        help="the newest versions that are allowed, not the present ones",
    )
    args = parser.parse_args()
    LOCKS.mkdir(exist_ok=True)
    for name, requirements in wanted().items():
        _compile(name, requirements, args.upgrade)
    return 0


def _listed(project: str, name: str) -> list[str]:
    """The entries of a list in pyproject.toml, without torch and the project itself.

    Python 3.10 has no tomllib.
    """
    block = re.search(rf"^{name} = \[(.*?)\]$", project, re.DOTALL | re.MULTILINE)
    if block is None:
        sys.exit(f"pyproject.toml has no list {name!r}")
    entries = re.findall(r'"([^"]+)"', block[1])
    return [entry for entry in entries if not re.match(r"(torch|ktransformers-hybrimoe)\b", entry)]


def _compile(name: str, requirements: list[str], upgrade: bool) -> None:
    path = lock(name)
    command = [*_uv(), "pip", "compile", "-", "--output-file", str(path)]
    command += [
        "--universal",
        "--python-version",
        "3.10",
        "--generate-hashes",
        "--no-annotate",
        "--quiet",
    ]
    command += [
        "--custom-compile-command",
        "python scripts/lock.py",
        *(["--upgrade"] if upgrade else []),
    ]
    if name in SEPARATE:
        command.append("--no-deps")
    larger = LOCKS / f"{name}-dev.txt" if name != "run" else LOCKS / "dev.txt"
    if larger.exists():  # the same versions in both
        command += ["--constraint", str(larger)]
    subprocess.run(command, input="\n".join(requirements), text=True, check=True)


def _uv() -> list[str]:
    found = shutil.which("uv")
    return [found] if found else [sys.executable, "-m", "uv"]


if __name__ == "__main__":
    sys.exit(main())
