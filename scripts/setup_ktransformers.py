"""Make the environment of the classic ktransformers host: `python scripts/setup_ktransformers.py [--dev] [--venv DIR]`.

It is one of its own, because that release pins an old transformers. Needs Python's standard library only; no compiler.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import venv
from pathlib import Path

import setup_env
from setup_env import ROOT, TORCH, asked

LIBRARIES = (
    "transformers==4.43.2",
    "fire",
    "sentencepiece",
    "setuptools>=70.1",
    *asked("gguf", "jinja2", "numpy", "psutil", "pyyaml", "rich", "tqdm"),
)
DEV = tuple(asked("hypothesis", "pytest"))
WITHOUT_DEPENDENCIES = ("kt-kernel==0.7.2",)
"""It pins a torch with CUDA that it does not link."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-ktransformers")
    parser.add_argument("--dev", action="store_true", help="with what the tests need")
    args = parser.parse_args()
    stamp = args.venv / f".hybrimoe-{'dev' if args.dev else 'run'}"
    sources = (Path(__file__), ROOT / "pyproject.toml", ROOT / "hybrimoe_plugin/hosts/ktransformers/release.py")
    if stamp.exists() and all(stamp.stat().st_mtime >= source.stat().st_mtime for source in sources):
        return 0
    started = time.monotonic()
    say(f"environment in {args.venv.name}")
    if not (args.venv / "bin" / "python").exists():
        venv.create(args.venv, with_pip=True)
    python = str(args.venv / "bin" / "python")
    setup_env._install_torch(python)
    say("libraries")
    constraint = args.venv / "constraints.txt"
    constraint.write_text(f"{TORCH}\n", encoding="utf-8")  # nothing below may replace torch by a build with CUDA
    wanted = [*LIBRARIES, *(DEV if args.dev else ())]
    setup_env._pip(python, "install", "--constraint", str(constraint), *wanted)
    # This project too: its own dependencies are the default host's.
    setup_env._pip(python, "install", "--no-deps", *WITHOUT_DEPENDENCIES, "--editable", str(ROOT))
    say("ktransformers")
    command = [python, "-m", "hybrimoe_plugin", "install_ktransformers"]
    if subprocess.run(command, check=False).returncode:
        return 2
    stamp.touch()
    say(f"ready after {time.monotonic() - started:.0f} s")
    return 0


def say(what: str) -> None:
    print(f"set-up: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
