"""Make the environment of the classic ktransformers host.

    python scripts/setup_ktransformers.py [--dev] [--venv DIR]

It is one of its own, because that release pins an old transformers. Needs Python's standard library
only; no compiler.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import venv
from pathlib import Path

import setup_env
from setup_env import ROOT, asked, locks, say

LIBRARIES = (
    "transformers==4.43.2",
    "fire",
    "sentencepiece",
    "setuptools>=77",
    *asked("gguf", "jinja2", "numpy", "psutil", "pyyaml", "rich", "tqdm"),
)
DEV = tuple(asked("hypothesis", "pytest"))
"""Asked for in these ranges; `scripts/lock.py` chooses the versions."""


def main() -> int:
    """Make the environment unless it is up to date; gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-ktransformers")
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    args = parser.parse_args()
    stamp = args.venv / f".hybrimoe-{'dev' if args.dev else 'run'}"
    sources = (
        Path(__file__),
        ROOT / "pyproject.toml",
        ROOT / "hybrimoe_plugin/hosts/ktransformers/release.py",
        *ROOT.glob("hybrimoe_plugin/**/*.c"),
        *locks(),
    )
    if stamp.exists() and all(
        stamp.stat().st_mtime >= source.stat().st_mtime for source in sources
    ):
        return 0
    started = time.monotonic()
    say(f"environment in {args.venv.name}")
    if not (args.venv / "bin" / "python").exists():
        venv.create(args.venv, with_pip=True)
    python = str(args.venv / "bin" / "python")
    say("libraries")
    setup_env.install_locked(python, "ktransformers-dev" if args.dev else "ktransformers")
    setup_env.install_torch(python)
    setup_env.install_locked(python, "kernels")  # pins a torch with CUDA that it does not link
    # Without its dependencies: they are the default host's.
    setup_env.pip(python, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    say("ktransformers")
    command = [python, "-m", "hybrimoe_plugin", "install_ktransformers"]
    if subprocess.run(command, check=False).returncode:
        return 2
    stamp.touch()
    say(f"ready after {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
