"""Make the environment of the tests with Ray.

    python scripts/setup_ray.py

It sees everything in .venv, which `make setup-dev` has made, and adds Ray. Not in .venv itself,
since Ray brings forty packages that nothing else needs. Needs Python's standard library only.
"""

from __future__ import annotations

import sys
import time
import venv
from pathlib import Path

import setup_env
from setup_env import ROOT, say

RAY = "ray[serve]==2.60.0"


def main() -> int:
    """Make the environment unless it is up to date; gives the exit status."""
    folder = ROOT / ".venv-ray"
    stamp = folder / ".hybrimoe-dev"
    base = ROOT / ".venv" / ".hybrimoe-dev"
    sources = (Path(__file__), ROOT / "pyproject.toml", base)
    if stamp.exists() and all(
        stamp.stat().st_mtime >= source.stat().st_mtime for source in sources
    ):
        return 0
    started = time.monotonic()
    say(f"environment in {folder.name}")
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = Path("lib") / version / "site-packages"
    seen = ROOT / ".venv" / packages
    (folder / packages / "base.pth").write_text(f"import site; site.addsitedir({str(seen)!r})\n")
    setup_env.pip(str(folder / "bin" / "python"), "install", RAY)
    stamp.touch()
    say(f"ready after {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
