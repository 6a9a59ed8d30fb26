"""Fetch llama.cpp's converter, vocabularies and chat templates, as tests' oracle.

    python scripts/llama_cpp_source.py

They come from one pinned source package, llama-cpp-python's, which pip compares with its hash. They
are extracted into build/ and nothing is compiled. Prints the directory.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASE = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
FOLDER = ROOT / "build" / f"llama-cpp-python-{RELEASE}"
INSIDE = f"llama_cpp_python-{RELEASE}/vendor/llama.cpp/"
PARTS = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/", "models/")
"""What is extracted of llama.cpp."""


def main() -> int:
    """Fetch unless it is there; gives the exit status."""
    fetch(FOLDER, PARTS)
    print(FOLDER)
    return 0


def fetch(folder: Path, parts: Sequence[str]) -> None:
    """Have some of llama.cpp's sources in a folder, unless it is there already.

    Args:
        parts: beginnings of the paths to extract, as llama.cpp has them; "" is all of them.
    """
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix="hybrimoe-") as downloads:
            _extract(_download(Path(downloads)), folder, parts)


def _download(folder: Path) -> Path:
    asked = folder / "asked.txt"
    asked.write_text(f"llama-cpp-python=={RELEASE} --hash=sha256:{SHA256}\n")
    options = ["--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(asked)]
    subprocess.run(command, check=True)
    (found,) = folder.glob("*.tar.gz")
    return found


def _extract(archive: Path, folder: Path, parts: Sequence[str]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    wanted = tuple(INSIDE + part for part in parts)
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.startswith(wanted)]
        tar.extractall(partial, members, filter="data")
    (partial / INSIDE).rename(folder)
    shutil.rmtree(partial)


if __name__ == "__main__":
    raise SystemExit(main())
